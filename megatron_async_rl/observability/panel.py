"""Renders a RunStatus for people: the panel of the terminal, a summary, one line for a log."""

from __future__ import annotations

import io
import itertools
import time
from collections import Counter

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_async_rl.observability.evaluation_table import before_and_after, courses
from megatron_async_rl.observability.status import FINAL_STATES, RunStatus, ServerStatus

SILENT_S = 60.0  # an unfinished run with an older status is marked
MAX_SERVER_ROWS = 8  # larger fleets are shown as counts
SPARK_WIDTH = 24
BLOCKS = "▁▂▃▄▅▆▇█"
STATE_STYLE = {"failed": "bold red", "finished": "bold green", "training": "bold cyan"}


def age_s(status: RunStatus, now_unix: float | None = None) -> float:
    """Returns the seconds since the status was written, by the wall clock: for people only."""
    if now_unix is None:
        now_unix = time.time()
    return now_unix - status.updated_unix


def render(status: RunStatus, now_unix: float | None = None) -> Panel:
    """Returns the panel; it fits 80 columns."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(ratio=1)
    rows.add_row("step", _progress(status))
    for name, known, draw in (
        ("reward", status.reward_mean, _reward),
        ("tokens/s", status.generate_tokens_per_s, _throughput),
        ("staleness", status.staleness_max, _staleness),
        ("weights", status.update_s, _weights),
        ("time", status.step_s, _step_time),
        ("trainer", status.trainer_memory_gib, _trainer),
    ):
        if known is not None:
            rows.add_row(name, draw(status))
    if status.ledger:
        rows.add_row("groups", _groups(status.ledger))
    if status.fleet:
        rows.add_row("fleet", _fleet(status.fleet))
    if status.evals or status.evaluating:
        rows.add_row("eval", _evals(status))
    notes = [Text(f"warning: {note}", "yellow") for note in status.notes]
    if status.message:
        notes.append(Text(status.message, "red" if status.state == "failed" else "italic"))
    silent_s = age_s(status, now_unix)
    if status.state not in FINAL_STATES and status.updated_unix and silent_s > SILENT_S:
        age = duration_text(silent_s)
        notes.append(Text(f"no update for {age}: is process {status.pid} alive?", "yellow"))
    title = Text.assemble(
        "megatron_async_rl  ", (status.state, STATE_STYLE.get(status.state, "bold yellow"))
    )
    return Panel(
        Group(rows, *notes), title=title, title_align="left", border_style="dim", padding=(0, 1)
    )


def ledger_table(status: RunStatus) -> Table:
    """Returns the ledger in full, with every reason for which groups were dropped."""
    table = Table("groups", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, count in status.ledger.items():
        table.add_row(name, f"{count:,}")
    return table


def summary(status: RunStatus) -> str:
    """Returns the text printed at the end of a run: evaluation and reward, before and after."""
    took = duration_text(status.elapsed_s)
    lines = [f"{status.state} after {status.version} of {status.steps} steps in {took}"]
    if status.message:
        lines[0] += f": {status.message}"
    lines += [f"evaluation  {line}" for line in before_and_after(status.evals)]
    if status.reward_history:
        first, last = status.reward_history[0], status.reward_history[-1]
        lines.append(f"reward      {first:.3f} in the first step  ->  {last:.3f} in the last")
    if status.staleness_max is not None:
        lines.append(
            f"staleness   mean {_number(status.staleness_mean)}, max {status.staleness_max} "
            f"in the last step, {status.staleness_worst} in the whole run, limit "
            f"{status.staleness_limit}; {status.interrupted_samples:,} samples resumed under "
            "newer weights"
        )
    if status.ledger:
        lines.append(f"groups      {_groups(status.ledger).plain}")
    return "\n".join(lines)


def log_line(status: RunStatus) -> str:
    dropped = _dropped(status.ledger)
    drops = f"{sum(dropped.values()):,} groups dropped ({_counts(dropped)})" if dropped else ""
    if status.state == "failed":
        message = " ".join(status.message.splitlines()[:2])  # a traceback may follow
        return f"failed{f' | {drops}' if drops else ''}: {message}"
    rate, ends = status.generate_tokens_per_s, status.state in FINAL_STATES
    worst = f"worst {status.staleness_worst} of {status.staleness_limit}"
    parts = [
        status.state,
        status.message,
        f"step {status.version}/{status.steps}" if status.steps else "",
        "" if status.reward_mean is None else f"reward {status.reward_mean:.3f}",
        "" if rate is None or ends else f"{rate:,.0f} tokens/s generated",
        "" if status.staleness_max is None else f"staleness max {status.staleness_max}, {worst}",
        "" if status.update_s is None else f"update {status.update_s:.2f} s",
        drops,
        f"evaluating {status.evaluating}" if status.evaluating else "",
        *(f"eval {name} {text}" for name, text in courses(status.evals, most=1).items()),
        "" if status.eta_s is None or ends else f"{duration_text(status.eta_s)} left",
    ]
    return " | ".join(filter(None, parts))


def screenshot_svg(status: RunStatus, width: int = 88) -> str:
    """Returns the panel as an SVG picture of a terminal of that width."""
    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(render(status, now_unix=status.updated_unix))
    return console.export_svg(title="megatron-async-rl run")


def _progress(status: RunStatus) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_column(no_wrap=True)
    row.add_column(ratio=1, min_width=10)
    row.add_column(no_wrap=True, justify="right")
    if status.state in FINAL_STATES:
        clock = f"took {duration_text(status.elapsed_s)}"
    else:
        parts = [f"{duration_text(status.elapsed_s)} elapsed"] if status.elapsed_s else []
        parts += [f"{duration_text(status.eta_s)} left"] if status.eta_s is not None else []
        clock = ", ".join(parts)
    bar = ProgressBar(total=status.steps or 1, completed=status.version, finished_style="green")
    row.add_row(f"{status.version}/{status.steps or '?'}", bar, clock)
    return row


def _reward(status: RunStatus) -> Text:
    history = status.reward_history
    text = Text(_number(status.reward_mean, 3), "bold green")
    if len(history) > 1:
        text.append(f"  {_spark(history)}", "green")
        text.append(f"  from {history[0]:.3f}", "dim")
    if status.reward_all_mean is not None:
        text.append(f"   all scored groups {status.reward_all_mean:.3f}")
    return text


def _throughput(status: RunStatus) -> Text:
    generated = _number(status.generate_tokens_per_s, 0)
    trained = _number(status.train_tokens_per_s, 0)
    return Text.assemble((generated, "bold"), " generated   ", (trained, "bold"), " trained")


def _staleness(status: RunStatus) -> Text:
    over = (status.staleness_worst or 0) > status.staleness_limit
    text = Text.assemble(
        "mean ",
        (_number(status.staleness_mean), "bold"),
        "   max ",
        (str(status.staleness_max), "bold"),
        "   worst so far ",
        (str(status.staleness_worst), "bold red" if over else "bold"),
        f" of {status.staleness_limit}",
    )
    if status.interrupted_samples:
        text.append(f"   {status.interrupted_samples:,} samples interrupted by an update", "dim")
    return text


def _weights(status: RunStatus) -> Text:
    text = Text.assemble("last update ", (_seconds(status.update_s), "bold"))
    if status.update_fraction is not None:
        text.append(f"   {status.update_fraction:.1%} of the time")
    return text


def _step_time(status: RunStatus) -> Text:
    text = Text.assemble("step ", (_seconds(status.step_s), "bold"))
    if status.train_wait_fraction is not None:
        text.append(f"   trainer waited for samples {status.train_wait_fraction:.0%} of it")
    return text


def _trainer(status: RunStatus) -> Text:
    text = Text.assemble("peak memory ", (f"{status.trainer_memory_gib:.1f} GiB", "bold"))
    if status.mfu is not None:
        text.append(f"   MFU {status.mfu:.1%}")
    return text


def _groups(ledger: dict[str, int]) -> Text:
    """admitted = trained + pending + dropped; red if the sum does not match."""
    reasons = _dropped(ledger)
    admitted, trained, pending = (ledger.get(n, 0) for n in ("admitted", "trained", "pending"))
    dropped = sum(reasons.values())
    balanced = admitted == trained + pending + dropped
    text = Text.assemble(
        f"{admitted:,} admitted ",
        ("=", "") if balanced else ("!=", "bold red"),
        f" {trained:,} trained + {pending:,} pending + {dropped:,} dropped",
    )
    if dropped:
        text.append(f" ({_counts(reasons)})", "dim")
    return text


def _dropped(ledger: dict[str, int]) -> dict[str, int]:
    """Returns the numbers of dropped groups by reason."""
    return {
        name.removeprefix("dropped."): count
        for name, count in ledger.items()
        if name.startswith("dropped.") and count
    }


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in reasons.items())


def _fleet(fleet: list[ServerStatus]) -> RenderableType:
    if len(fleet) > MAX_SERVER_ROWS:
        kinds = Counter((server.state, server.version) for server in fleet).most_common()
        counts = "   ".join(f"{count} {state} v{version}" for (state, version), count in kinds)
        running = sum(server.running for server in fleet)
        return Text(f"{len(fleet)} servers, {running:,} samples running:  {counts}")
    columns = ["server", "state", "weights", "running"]
    if has_figures := any(server.queued is not None for server in fleet):
        columns += ["queue", "KV", "hits", "tok/s"]
    table = Table(*columns, box=None, pad_edge=False)
    table.header_style = "dim"
    for column in table.columns[2:]:
        column.justify = "right"
    for server in fleet:
        version = f"v{server.version}" if server.version >= 0 else "-"
        row = [server.name, server.state, version, str(server.running)]
        if has_figures:
            row += [
                _number(server.queued, 0),
                _share(server.kv_use),
                _share(server.cache_hits),
                _number(server.tokens_per_s, 0),
            ]
        table.add_row(*row)
    return table


def _evals(status: RunStatus) -> Text:
    lines = [f"{name}  {text}" for name, text in courses(status.evals).items()]
    lines += [f"running: {status.evaluating}"] if status.evaluating else []
    return Text("\n".join(lines))


def _spark(values: list[float]) -> str:
    """Draws at most SPARK_WIDTH blocks, each the mean of equally many values, over their range."""
    width = min(SPARK_WIDTH, len(values))
    edges = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, spread = min(means), max(means) - min(means)
    levels = [(mean - low) / spread if spread else 0.0 for mean in means]
    return "".join(BLOCKS[round(level * (len(BLOCKS) - 1))] for level in levels)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s" if value < 10 else f"{value:,.1f} s"


def duration_text(seconds: float) -> str:
    """Returns 1:05 or 2:00:10."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
