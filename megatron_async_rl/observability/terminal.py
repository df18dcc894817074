"""What a person sees of a run while it goes on: a live panel on a terminal, plain lines elsewhere, a summary last.

Everything is drawn from `status.json` alone, so the same panel follows a run from any shell that sees its folder.
"""

from __future__ import annotations

import io
import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.run_log import FINAL_STATES, Server, Status, read_status

POLL_S = 0.5
PLAIN_LINE_S = 5.0  # without a terminal: a sign of life this often while no version changes
SILENT_S = 60.0  # a running run that has written no status for so long is marked
MAX_SERVER_ROWS = 8  # a larger fleet is shown in numbers
SPARK_WIDTH = 24
BLOCKS = "▁▂▃▄▅▆▇█"
STATE_STYLE = {"failed": "bold red", "finished": "bold green", "training": "bold cyan"}


def render(status: Status, now_unix: float | None = None) -> RenderableType:
    """The panel; 80 columns are enough for it."""
    now_unix = time.time() if now_unix is None else now_unix
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(ratio=1)
    rows.add_row("step", _progress(status))
    if status.reward_mean is not None:
        rows.add_row("reward", _reward(status))
    if status.generate_tokens_per_s is not None:
        rows.add_row("tokens/s", _throughput(status))
    if status.staleness_max is not None:
        rows.add_row("staleness", _staleness(status))
    if status.update_s is not None:
        rows.add_row("weights", _weights(status))
    if status.step_s is not None:
        rows.add_row("time", _time(status))
    if status.ledger:
        rows.add_row("groups", _state(status.ledger))
    if status.fleet:
        rows.add_row("fleet", _fleet(status.fleet))
    if status.evals:
        rows.add_row("eval", Text(_evals(status)))
    title = Text.assemble(
        "megatron_async_rl  ", (status.state, STATE_STYLE.get(status.state, "bold yellow"))
    )
    notes = (
        [Text(status.message, "red" if status.state == "failed" else "italic")]
        if status.message
        else []
    )
    silent_s = now_unix - status.updated_unix
    if status.state not in FINAL_STATES and status.updated_unix and silent_s > SILENT_S:
        notes.append(
            Text(
                f"no news for {_duration(silent_s)}: is process {status.pid} still there?", "yellow"
            )
        )
    return Panel(
        Group(rows, *notes), title=title, title_align="left", border_style="dim", padding=(0, 1)
    )


def ledger(status: Status) -> RenderableType:
    """The books in full: every reason for which a group was dropped."""
    table = Table("groups", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, count in status.ledger.items():
        table.add_row(name, f"{count:,}")
    return table


def summary(status: Status) -> str:
    """The last lines of a run: what it was for, before and after."""
    took = _duration(status.elapsed_s)
    lines = [f"{status.state} after {status.version} of {status.steps} steps in {took}"]
    if status.message:
        lines[0] += f": {status.message}"
    if len(status.evals) >= 2:
        before, after = status.evals[0], status.evals[-1]
        lines.append(
            f"evaluation  {before.accuracy:.1%} before (v{before.version})  ->  "
            f"{after.accuracy:.1%} after (v{after.version}), on {after.num} problems"
        )
    elif status.evals:
        only = status.evals[0]
        lines.append(f"evaluation  {only.accuracy:.1%} at v{only.version}, on {only.num} problems")
    if status.reward_history:
        first, last = status.reward_history[0], status.reward_history[-1]
        lines.append(f"reward      {first:.3f} in the first step  ->  {last:.3f} in the last")
    if status.staleness_max is not None:
        lines.append(
            f"staleness   mean {_number(status.staleness_mean)}, max {status.staleness_max} in the last step, "
            f"{status.staleness_worst} in the whole run, of {status.staleness_limit} allowed; "
            f"{status.interrupted_samples:,} samples went on under newer weights"
        )
    if status.ledger:
        lines.append(f"groups      {_state(status.ledger).plain}")
    return "\n".join(lines)


def line(status: Status) -> str:
    """One line, for logs."""
    if status.state == "failed":
        return f"failed: {status.message}"
    parts = [status.state]
    if status.message:
        parts.append(status.message)
    if status.steps:
        parts.append(f"step {status.version}/{status.steps}")
    if status.reward_mean is not None:
        parts.append(f"reward {status.reward_mean:.3f}")
    if status.generate_tokens_per_s is not None:
        parts.append(f"{status.generate_tokens_per_s:,.0f} tokens/s generated")
    if status.staleness_max is not None:
        parts.append(
            f"staleness max {status.staleness_max}, worst {status.staleness_worst} of {status.staleness_limit}"
        )
    if status.update_s is not None:
        parts.append(f"update {status.update_s:.2f} s")
    if status.evals:
        parts.append(f"eval {status.evals[-1].accuracy:.1%} at v{status.evals[-1].version}")
    if status.eta_s is not None and status.state not in FINAL_STATES:
        parts.append(f"{_duration(status.eta_s)} left")
    return " | ".join(parts)


def live(run_dir: Path, stop: Callable[[], bool], console: Console | None = None) -> None:
    """Follows the run until `stop()`: a panel on a terminal, else a line at each change of version or state."""
    console = console or Console()
    began, before = time.monotonic(), _ended_before(run_dir)

    def read() -> Status:
        return _read(run_dir, before, time.monotonic() - began)

    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as panel:
            while not stop():
                panel.update(render(read()), refresh=True)
                time.sleep(POLL_S)
            panel.update(render(read()), refresh=True)
        return
    shown, shown_at = None, 0.0
    while True:
        stopping = stop()  # asked first: what was written before it is still shown
        status = read()
        change = (status.state, status.version, status.message)
        waiting = status.state not in ("training", *FINAL_STATES)
        if change != shown or (waiting and time.monotonic() - shown_at > PLAIN_LINE_S - POLL_S):
            waited = (
                f" | {_duration(time.monotonic() - began)} so far"
                if waiting and change == shown
                else ""
            )
            console.print(line(status) + waited, soft_wrap=True, markup=False, highlight=False)
            shown, shown_at = change, time.monotonic()
        if stopping:
            return
        time.sleep(POLL_S)


def screenshot_svg(status: Status, width: int = 88) -> str:
    """The panel as it looks on a terminal of that width."""
    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(render(status, now_unix=status.updated_unix))
    return console.export_svg(title="python -m megatron_async_rl run")


def _ended_before(run_dir: Path) -> Status | None:
    """The end of an earlier run in this folder, which stands there until the next one writes."""
    try:
        status = read_status(run_dir)
    except DataError:
        return None
    return status if status.state in FINAL_STATES else None


def _read(run_dir: Path, before: Status | None, waited_s: float) -> Status:
    """The status, or that of a run that starts."""
    try:
        status = read_status(run_dir)
    except DataError:
        status = before
    if status is None or status == before:
        return Status(message="waiting for the controller", elapsed_s=waited_s)
    return status


def _progress(status: Status) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    row.add_column(no_wrap=True)
    row.add_column(ratio=1, min_width=10)
    row.add_column(no_wrap=True, justify="right")
    if status.state in FINAL_STATES:
        clock = f"took {_duration(status.elapsed_s)}"
    else:
        parts = [f"{_duration(status.elapsed_s)} gone"] if status.elapsed_s else []
        parts += [f"{_duration(status.eta_s)} left"] if status.eta_s is not None else []
        clock = ", ".join(parts)
    bar = ProgressBar(total=status.steps or 1, completed=status.version, finished_style="green")
    row.add_row(f"{status.version}/{status.steps or '?'}", bar, clock)
    return row


def _reward(status: Status) -> Text:
    history = status.reward_history
    text = Text(_number(status.reward_mean, 3), "bold green")
    if len(history) > 1:
        text.append(f"  {_spark(history)}", "green")
        text.append(f"  from {history[0]:.3f}", "dim")
    return text


def _throughput(status: Status) -> Text:
    generated, trained = (
        _number(status.generate_tokens_per_s, 0),
        _number(status.train_tokens_per_s, 0),
    )
    return Text.assemble((generated, "bold"), " generated   ", (trained, "bold"), " trained")


def _staleness(status: Status) -> Text:
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


def _weights(status: Status) -> Text:
    text = Text.assemble("last update ", (_seconds(status.update_s), "bold"))
    if status.update_fraction is not None:
        text.append(f"   {status.update_fraction:.1%} of the time")
    return text


def _time(status: Status) -> Text:
    text = Text.assemble("step ", (_seconds(status.step_s), "bold"))
    if status.train_wait_fraction is not None:
        text.append(f"   trainer waits for samples {status.train_wait_fraction:.0%} of it")
    return text


def _state(state: dict[str, int]) -> Text:
    """admitted = trained + pending + dropped; red where it does not add up."""
    reasons = {
        name.removeprefix("dropped."): count
        for name, count in state.items()
        if name.startswith("dropped.")
    }
    admitted, trained, pending = (state.get(name, 0) for name in ("admitted", "trained", "pending"))
    dropped = sum(reasons.values())
    balanced = admitted == trained + pending + dropped
    text = Text.assemble(
        f"{admitted:,} admitted ",
        ("=", "") if balanced else ("!=", "bold red"),
        f" {trained:,} trained + {pending:,} pending + {dropped:,} dropped",
    )
    if dropped:
        text.append(
            f" ({', '.join(f'{count:,} {name}' for name, count in reasons.items() if count)})",
            "dim",
        )
    return text


def _fleet(fleet: list[Server]) -> RenderableType:
    if len(fleet) > MAX_SERVER_ROWS:
        kinds = Counter((server.state, server.version) for server in fleet)
        counts = "   ".join(
            f"{count} {state} v{version}" for (state, version), count in kinds.most_common()
        )
        return Text(
            f"{len(fleet)} servers, {sum(server.running for server in fleet):,} samples running:  {counts}"
        )
    table = Table(
        "server", "state", "weights", "running", box=None, pad_edge=False, header_style="dim"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for server in fleet:
        table.add_row(server.name, server.state, f"v{server.version}", str(server.running))
    return table


def _evals(status: Status) -> str:
    shown = status.evals if len(status.evals) <= 4 else [status.evals[0], *status.evals[-3:]]
    scores = "  ->  ".join(f"{e.accuracy:.1%} (v{e.version})" for e in shown)
    return f"{scores}   on {shown[-1].num} problems"


def _spark(values: list[float]) -> str:
    """At most SPARK_WIDTH blocks, each the mean of as many values; the lowest and highest block span the range."""
    width = min(SPARK_WIDTH, len(values))
    cuts = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, spread = min(means), max(means) - min(means)
    return "".join(
        BLOCKS[round((mean - low) / spread * (len(BLOCKS) - 1)) if spread else 0] for mean in means
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s" if value < 10 else f"{value:,.1f} s"


def _duration(seconds: float) -> str:
    """1:05 or 2:00:10"""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
