"""Studies the effect of staleness and of its correction: runs over max_staleness x loss x seed.

    python tools/study_staleness.py OUT [CONFIG] [--max-staleness 0 1 4 8]
        [--losses decoupled_ppo ppo] [--seeds 1 2 3] [--set key=value ...]

Each run is `python -m megatron_async_rl run CONFIG run.dir=OUT/... ` with its settings. A finished
run is not repeated, so an interrupted study can be continued. OUT/study.md holds a table,
OUT/study.svg the reward by step, averaged over seeds. The final reward is the mean over the last
fifth of the steps; the accuracy is that of the evaluation after the last step.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.status import RunStatus, read_status

Case = tuple[int, str]  # staleness.max_staleness, loss
REPOSITORY = Path(__file__).resolve().parent.parent
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")


def finished(run_dir: Path) -> RunStatus | None:
    try:
        status = read_status(run_dir)
    except DataError:
        return None
    return status if status.state == "finished" else None


def run(
    config: str, run_dir: Path, case: Case, seed: int, overrides: list[str]
) -> RunStatus | None:
    """Returns the status of the finished run, None if it failed; its output is in OUT/NAME.log."""
    if done := finished(run_dir):
        return done
    max_staleness, loss = case
    command = [
        sys.executable,
        "-m",
        "megatron_async_rl",
        "run",
        config,
        "--from-scratch",
        f"run.dir={run_dir}",
    ]
    command += [
        f"staleness.max_staleness={max_staleness}",
        f"algorithm.loss.objective={loss}",
        f"run.seed={seed}",
        *overrides,
    ]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(
            ":"
        )
    }
    started = time.monotonic()
    with run_dir.with_suffix(".log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env).returncode
    sys.stdout.write(f"{run_dir.name}: exit code {code} after {time.monotonic() - started:.0f} s\n")
    sys.stdout.flush()
    return finished(run_dir)


def final_reward(status: RunStatus) -> float:
    history = status.reward_history
    return statistics.fmean(history[-max(1, len(history) // 5) :])


def accuracy(status: RunStatus) -> float | None:
    """Returns the accuracy after the last step, None without an evaluation of it."""
    last = status.evals[-1] if status.evals else None
    return last.metrics.get("accuracy") if last and last.version == status.version else None


def table(results: dict[Case, list[RunStatus]]) -> str:
    lines = [
        "| max_staleness | loss | runs | final reward | of synchronous | accuracy | staleness |",
        "|---|---|---|---|---|---|---|",
    ]
    synchronous = [
        final_reward(s)
        for (max_staleness, _), runs in results.items()
        if max_staleness == 0
        for s in runs
    ]
    for (max_staleness, loss), runs in results.items():
        if not runs:
            lines.append(f"| {max_staleness} | {loss} | 0 | no run finished | | | |")
            continue
        rewards = [final_reward(s) for s in runs]
        share = (
            f"{statistics.fmean(rewards) / statistics.fmean(synchronous):.1%}"
            if synchronous
            else ""
        )
        accuracies = [a for a in map(accuracy, runs) if a is not None]
        lines.append(
            f"| {max_staleness} | {loss} | {len(runs)} | {_spread(rewards)} | {share} "
            f"| {_spread(accuracies)} | "
            f"{statistics.fmean(s.staleness_mean for s in runs):.2f} |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def plot(results: dict[Case, list[RunStatus]], width: int = 720, height: int = 400) -> str:
    """Returns an SVG of reward by step: one line per case, averaged over its seeds."""
    curves = {
        case: [
            statistics.fmean(step) for step in zip(*(s.reward_history for s in runs), strict=False)
        ]
        for case, runs in results.items()
        if runs
    }
    steps = max((len(curve) for curve in curves.values()), default=1)
    low = min((min(curve) for curve in curves.values()), default=0.0)
    high = max((max(curve) for curve in curves.values()), default=1.0)
    left, top, inner_w, inner_h = 50, 15, width - 210, height - 60

    def at(step: int, reward: float) -> str:
        x = left + inner_w * step / max(1, steps - 1)
        return f"{x:.1f},{top + inner_h * (1 - (reward - low) / ((high - low) or 1)):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif">'
    ]
    parts.append(
        f'<rect x="{left}" y="{top}" width="{inner_w}" height="{inner_h}" '
        'fill="none" stroke="#999"/>'
    )
    parts.append(
        f'<text x="{left + inner_w / 2:.0f}" y="{height - 12}" font-size="13">training step</text>'
    )
    for value, y in ((high, top + 10), (low, top + inner_h)):
        parts.append(f'<text x="5" y="{y}" font-size="12">{value:.2f}</text>')
    for n, ((max_staleness, loss), curve) in enumerate(curves.items()):
        color, dash = COLORS[n % len(COLORS)], ' stroke-dasharray="6 3"' if loss == "ppo" else ""
        points = " ".join(at(step, reward) for step, reward in enumerate(curve))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"{dash}/>'
        )
        y = top + 15 + 20 * n
        parts.append(
            f'<text x="{left + inner_w + 10}" y="{y}" font-size="13" fill="{color}">'
            f"max_staleness {max_staleness}, {loss}</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "config", nargs="?", default=str(REPOSITORY / "configs" / "quickstart.yaml")
    )
    parser.add_argument("--max-staleness", type=int, nargs="+", default=[0, 1, 4, 8])
    parser.add_argument("--losses", nargs="+", default=["decoupled_ppo", "ppo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--set", metavar="key=value", action="append", default=[], help="a setting for every run"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cases = list(itertools.product(args.max_staleness, args.losses))
    results: dict[Case, list[RunStatus]] = {case: [] for case in cases}
    # seed by seed, so that an interrupted study has all cases
    for seed, case in itertools.product(args.seeds, cases):
        if status := run(
            args.config, args.out / f"staleness{case[0]}-{case[1]}-seed{seed}", case, seed, args.set
        ):
            results[case].append(status)
        (args.out / "study.md").write_text(table(results))
        (args.out / "study.svg").write_text(plot(results))
    sys.stdout.write(table(results))
    return 0 if all(len(runs) == len(args.seeds) for runs in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
