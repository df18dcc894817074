"""Results of evaluations as text: a table of one version, and the course over the versions."""

from __future__ import annotations

import re

from megatron_async_rl.observability.status import EvaluationResult

_COLUMNS = ("set", "problems", "accuracy", "95 % interval", "tokens", "cut off", "failed")


def evaluation_table(results: list[EvaluationResult]) -> str:
    """Returns a table with a line per set; `-` stands for a metric that has no value."""
    extra = sorted({name for r in results for name in r.metrics if _is_extra(name)}, key=_order)
    rows = [[*_COLUMNS, *(name.replace("_at_", "@") for name in extra)]]
    for result in results:
        metrics = result.metrics
        rows.append(
            [
                result.set,
                _whole(metrics.get("problems")),
                _percent(metrics.get("accuracy")),
                _interval(metrics),
                _whole(metrics.get("tokens_mean")),
                _percent(metrics.get("cut_off_fraction")),
                _whole(metrics.get("failed")),
                *(_value(name, metrics.get(name)) for name in extra),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def courses(results: list[EvaluationResult], most: int = 4) -> dict[str, str]:
    """Returns by set its accuracy over the versions: `31.2% (v0) -> 65.5% (v37), 256 problems`.

    Of more than `most` versions, the first and the last ones are shown.
    """
    found = {}
    for name, of_set in _by_set(results).items():
        last = max(1, most - 1)
        shown = of_set if len(of_set) <= most else [*of_set[: most - last], *of_set[-last:]]
        steps = [f"{_percent(r.metrics.get('accuracy'))} (v{r.version})" for r in shown]
        problems = _whole(shown[-1].metrics.get("problems"))
        found[name] = f"{' -> '.join(steps)}, {problems} problems"
    return found


def before_and_after(results: list[EvaluationResult]) -> list[str]:
    """Returns a line per set: `aime: 31.2% before (v0)  ->  65.5% after (v37), on 256 problems`."""
    lines = []
    for name, of_set in _by_set(results).items():
        first, last = of_set[0], of_set[-1]
        begin, end = (_percent(result.metrics.get("accuracy")) for result in (first, last))
        course = f"{begin} before (v{first.version})  ->  {end} after (v{last.version}), on"
        if len(of_set) == 1:
            course = f"{end} at v{last.version}, on"
        lines.append(f"{name}: {course} {_whole(last.metrics.get('problems'))} problems")
    return lines


def _by_set(results: list[EvaluationResult]) -> dict[str, list[EvaluationResult]]:
    found: dict[str, list[EvaluationResult]] = {}
    for result in results:
        found.setdefault(result.set, []).append(result)
    return found


def _is_extra(name: str) -> bool:
    return name.startswith(("pass_at_", "majority_at_", "rating"))


def _order(name: str) -> tuple[str, int]:
    kind, number = re.fullmatch(r"(.*?)(\d*)", name).groups()  # type: ignore[union-attr]
    return kind, int(number or 0)


def _value(name: str, value: float | None) -> str:
    return _whole(value) if name.startswith("rating") else _percent(value)


def _interval(metrics: dict[str, float]) -> str:
    low, high = metrics.get("accuracy_low"), metrics.get("accuracy_high")
    return "-" if low is None or high is None else f"{_percent(low)} to {_percent(high)}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
