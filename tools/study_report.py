"""The table, the curves and the values of a study of staleness (study_staleness.py).

All runs are compared over the same number of steps. Accuracies are those of one version, so samples
of older policies count only in the rewards.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Case = tuple[int, str]  # staleness.max_staleness, algorithm.loss.objective
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
SMOOTHED_STEPS = 10  # of the reward curves
MIN_CURVE_POINTS = 3
REWARD, STALENESS, CLIPPED = "reward/mean", "staleness/mean", "train/clip_fraction"


@dataclass(frozen=True)
class Run:
    """One run of the study."""

    case: Case
    seed: int
    run_dir: Path


@dataclass(frozen=True)
class Result:
    """The records of a run that has trained at least one step."""

    run: Run
    rewards: list[float]  # by step
    accuracies: dict[int, float]  # by version, of the first evaluation set
    others: dict[str, dict[int, float]]  # STALENESS, CLIPPED and other accuracies, by version

    def mean(self, tag: str, steps: int) -> float | None:
        values = [value for step, value in self.others[tag].items() if step < steps]
        return statistics.fmean(values) if values else None


def read(run: Run) -> Result | None:
    """Reads TensorBoard's files, in about a second. Returns None if no step was trained."""
    if not (folder := run.run_dir / "tensorboard").is_dir():
        return None
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    known = sorted(events.Tags()["scalars"])

    def values(tag: str) -> dict[int, float]:
        # a resumed run may repeat a step
        return {e.step: e.value for e in events.Scalars(tag)} if tag in known else {}

    rewards = values(REWARD)
    if not rewards:
        return None
    accuracy, *further = [tag for tag in known if re.fullmatch(r"eval/.+/accuracy", tag)] or [""]
    others = {tag: values(tag) for tag in (STALENESS, CLIPPED, *further)}
    return Result(run, [rewards[step] for step in sorted(rewards)], values(accuracy), others)


def write(out: Path, cases: Sequence[Case], results: Sequence[Result]) -> str:
    """Writes study.md, study.svg, accuracy.svg and curves.csv; returns the text of study.md."""
    text = table(cases, results)
    (out / "study.md").write_text(text)
    with (out / "curves.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("max_staleness", "objective", "seed", "quantity", "version", "value"))
        for result in results:
            rows.writerows((*result.run.case, result.run.seed, *row) for row in _values(result))
    rewards = {case: _mean_rewards(case, results) for case in cases}
    (out / "study.svg").write_text(plot(rewards, "training step"))
    versions = _common_versions(results)
    if len(versions) >= MIN_CURVE_POINTS:
        accuracies = {
            case: [
                (version, statistics.fmean(r.accuracies[version] for r in of_case))
                for version in versions
            ]
            for case in cases
            if (of_case := _of(case, results))
        }
        (out / "accuracy.svg").write_text(plot(accuracies, "version evaluated"))
    return text


def _values(result: Result) -> Iterator[tuple[str, int, float]]:
    yield from (("reward", step, value) for step, value in enumerate(result.rewards))
    yield from (("accuracy", *item) for item in sorted(result.accuracies.items()))
    for tag, values in result.others.items():
        yield from ((tag, *item) for item in sorted(values.items()))


def _of(case: Case, results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.run.case == case]


def _common_versions(results: Sequence[Result]) -> list[int]:
    if not results:
        return []
    return sorted(set.intersection(*(set(result.accuracies) for result in results)))


def table(cases: Sequence[Case], results: Sequence[Result]) -> str:
    if not results:
        return "no run has trained a step\n"
    steps = min(len(result.rewards) for result in results)
    versions = [version for version in _common_versions(results) if 0 < version <= steps]
    last = versions[-1] if versions else 0
    fifth = slice(steps - max(1, steps // 5), steps)

    def figures(case: Case) -> tuple[list[float], list[float]]:
        of_case = _of(case, results)
        rewards = [statistics.fmean(result.rewards[fifth]) for result in of_case]
        return rewards, [result.accuracies[last] for result in of_case if last]

    base = next((case for case in cases if case[0] == 0 and _of(case, results)), None)
    base_rewards, base_accuracies = figures(base) if base else ([], [])
    lines = [
        f"{len(results)} runs, the first {steps} steps of each. Reward: mean over the steps from "
        f"{fifth.start} on. Accuracy: of version {last}. Staleness and clipped tokens: means over "
        "the steps.",
        "",
        "| max_staleness | objective | runs | reward | of eta 0 | accuracy | of eta 0 | staleness "
        "| clipped |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        of_case = _of(case, results)
        rewards, accuracies = figures(case)
        staleness, clipped = ([r.mean(tag, steps) for r in of_case] for tag in (STALENESS, CLIPPED))
        cells = [
            *(*map(str, case), str(len(of_case))),
            *(_spread(rewards), _share(rewards, base_rewards)),
            *(_spread(accuracies), _share(accuracies, base_accuracies)),
            *(_mean(staleness, ".2f"), _mean(clipped, ".1%")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def _share(values: list[float], base: list[float]) -> str:
    if not values or not base or not statistics.fmean(base):
        return ""
    return f"{statistics.fmean(values) / statistics.fmean(base):.1%}"


def _mean(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(statistics.fmean(known), form) if known else ""


def _mean_rewards(case: Case, results: Sequence[Result]) -> list[tuple[int, float]]:
    """Returns the rewards by step: means over the seeds, then over SMOOTHED_STEPS."""
    by_seed = [result.rewards for result in _of(case, results)]
    means = [statistics.fmean(step) for step in zip(*by_seed, strict=False)]
    return [
        (step, statistics.fmean(means[max(0, step - SMOOTHED_STEPS + 1) : step + 1]))
        for step in range(len(means))
    ]


def plot(
    curves: dict[Case, list[tuple[int, float]]], label: str, width: int = 720, height: int = 400
) -> str:
    """Returns an SVG with one line per case; those of `ppo` are dashed."""
    curves = {case: curve for case, curve in curves.items() if curve}
    values = [value for curve in curves.values() for _, value in curve] or [0.0, 1.0]
    low, high = min(values), max(values)
    last = max((curve[-1][0] for curve in curves.values()), default=1)
    left, top, inner_w, inner_h = 50, 15, width - 250, height - 60

    def at(step: int, value: float) -> str:
        x = left + inner_w * step / max(1, last)
        return f"{x:.1f},{top + inner_h * (1 - (value - low) / ((high - low) or 1)):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<rect x="{left}" y="{top}" width="{inner_w}" height="{inner_h}" '
        'fill="none" stroke="#999"/>',
        f'<text x="{left + inner_w / 2:.0f}" y="{height - 12}" font-size="13" '
        f'text-anchor="middle">{label}</text>',
    ]
    for x, text in ((left, "0"), (left + inner_w, str(last))):
        parts.append(
            f'<text x="{x}" y="{height - 28}" font-size="12" text-anchor="middle">{text}</text>'
        )
    for value, y in ((high, top + 10), (low, top + inner_h)):
        parts.append(f'<text x="5" y="{y}" font-size="12">{value:.2f}</text>')
    for n, ((max_staleness, objective), curve) in enumerate(curves.items()):
        color = COLORS[n % len(COLORS)]
        dash = ' stroke-dasharray="6 3"' if objective == "ppo" else ""
        points = " ".join(at(step, value) for step, value in curve)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"{dash}/>'
        )
        parts.append(
            f'<text x="{left + inner_w + 10}" y="{top + 15 + 20 * n}" font-size="13" '
            f'fill="{color}">eta {max_staleness}, {objective}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])
