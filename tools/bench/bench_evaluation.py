#!/usr/bin/env python3
"""Compares the times of training steps with and without an evaluation, within the same run.

    python tools/bench/bench_evaluation.py OUT [KEY=VALUE ...]    CPU, two SGLang servers, one rank

Trains a model of random weights (bench_end_to_end.py, shape tiny) and evaluates a set every
--every versions, in evaluation.mode held_server and mixed. A step counts as one with an evaluation
if one ran during at least half of it, as one without if none ran, and is left out otherwise. Since
the load of a machine drifts, the difference is that of each step with an evaluation from the ten
nearest ones without: its mean, with a 95 % interval. Each mode is kept in OUT/rows: running again
continues with the modes that are missing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import yaml
from bench_end_to_end import PROMPT_WORDS, WARM_UP_STEPS, make_inputs
from bench_parts import CPU_ENGINE, make_parser, start_run

MODES = ("held_server", "mixed")
WITH, NEAREST = 0.5, 10
TIME = r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .*"
TAGS = ("perf/time/step_s", "perf/time/wait_for_batch_s", "perf/time/train_s")
BEGUN = re.compile(TIME + r"evaluation of version (\d+) \((?:held_server|mixed)\)", re.MULTILINE)
ENDED = re.compile(TIME + r"evaluation of version (\d+)(?::$| is abandoned)", re.MULTILINE)


class Step(NamedTuple):
    seconds: float
    waited_s: float
    trained_s: float
    share: float  # of its time, during which an evaluation ran


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every run")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=30, help="versions between evaluations")
    parser.add_argument("--problems", type=int, default=64)
    arguments = parser.parse_intermixed_args()
    out: Path = arguments.out.resolve()
    (out / "rows").mkdir(parents=True, exist_ok=True)
    make_inputs(out, "tiny")
    rows = (out / "train.jsonl").read_text().splitlines(keepends=True)
    (out / "eval.jsonl").write_text("".join(rows[-arguments.problems :]))
    for mode in arguments.modes:
        kept = out / "rows" / f"{mode}.json"
        if not kept.exists():
            kept.write_text(json.dumps(measure(out, mode, arguments)))
    print(table(out))


def measure(out: Path, mode: str, arguments: argparse.Namespace) -> list[Step]:
    tree: dict[str, Any] = {
        "run": {"dir": str(out / mode), "steps": arguments.steps, "export_every": 0, "seed": 1},
        "model": {"path": str(out / "model"), "context_tokens": 256, "random_init": True},
        "data": {"train": str(out / "train.jsonl")},
        "rollout": {"servers": 2, "max_new_tokens": 32, "max_concurrent_samples": 16},
        "reward": {"function": "planted_lengths:coin"},
        "algorithm": {"prompts_per_step": 4, "samples_per_prompt": 4},
        "evaluation": {
            "sets": {"problems": {"path": str(out / "eval.jsonl"), "temperature": 1.0}},
            "every": arguments.every,
            "mode": mode,
            "before": False,
            "after": False,
        },
        "trainer": {"precision": "fp32", "max_tokens_per_microbatch": 16 * (PROMPT_WORDS + 32)},
        "weights": {"snapshot_every": 1},
        "checkpoint": {"every": 0},
        "megatron": {"lr": 1e-7},
        "sglang": CPU_ENGINE | {"load_format": "dummy"},
    }
    path = out / f"{mode}.yaml"
    path.write_text(yaml.safe_dump(tree))
    if code := start_run(path, arguments.overrides).wait():
        raise SystemExit(f"the run ended with exit code {code}")
    return read_steps(out / mode)


def read_steps(run_dir: Path) -> list[Step]:
    """Returns the steps of a run after the first ones."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = (run_dir / "logs" / "controller.log").read_text()
    ends = {int(version): unix(text) for text, version in ENDED.findall(log)}
    spans = [(unix(text), ends.get(int(v), float("inf"))) for text, v in BEGUN.findall(log)]
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    steps = []
    for step, waited, trained in zip(*map(events.Scalars, TAGS), strict=True):
        start, end = step.wall_time - step.value, step.wall_time
        during = sum(max(0.0, min(end, b) - max(start, a)) for a, b in spans)
        if step.step > WARM_UP_STEPS:
            steps.append(Step(step.value, waited.value, trained.value, during / step.value))
    return steps


def unix(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f").timestamp()


def table(out: Path) -> str:
    lines = [
        "| mode | steps with | mean s | median s | waited s | train s | steps without | mean s "
        "| median s | waited s | train s | difference from the nearest steps, 95 % interval |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        if (kept := out / "rows" / f"{mode}.json").exists():
            steps = [Step(*values) for values in json.loads(kept.read_text())]
            groups = [s for s in steps if s.share >= WITH], [s for s in steps if not s.share]
            cells = [cell for group in groups for cell in summary(group)]
            lines.append(f"| {' | '.join([mode, *cells, difference(steps)])} |")
    return "\n".join(lines)


def summary(steps: list[Step]) -> list[str]:
    if not steps:
        return ["0", "", "", "", ""]
    seconds = [step.seconds for step in steps]
    figures = (
        statistics.fmean(seconds),
        statistics.median(seconds),
        statistics.fmean(step.waited_s for step in steps),
        statistics.fmean(step.trained_s for step in steps),
    )
    return [str(len(steps)), *(f"{figure:.2f}" for figure in figures)]


def difference(steps: list[Step]) -> str:
    """Returns the mean of (step with an evaluation - mean of the nearest steps without)."""
    without = [number for number, step in enumerate(steps) if not step.share]
    found = []
    for number, step in enumerate(steps):
        if step.share >= WITH:
            nearest = sorted(without, key=lambda other: abs(other - number))[:NEAREST]
            found.append(step.seconds - statistics.fmean(steps[n].seconds for n in nearest))
    if len(found) < 2:
        return ""
    half = 1.96 * statistics.stdev(found) / len(found) ** 0.5
    return f"{statistics.fmean(found):+.2f} ± {half:.2f} s"


if __name__ == "__main__":
    main()
