#!/usr/bin/env python3
"""Compares predictions of `plan` with measured runs and with AReaL's published eta sweep.

    python tools/bench/bench_plan.py
    python tools/bench/bench_plan.py --predict generation     a workload, before it is measured

Needs no GPU. Each measured run is simulated from its first to its last step with the lengths that
it had, and the same steps are averaged. The constants are those of planning/hardware.py for all
rows. Figures that were used to choose a constant are marked and do not count in the medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import bench_end_to_end as end_to_end
import numpy as np
from bench_parts import make_parser

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.planning import analytic, hardware
from megatron_async_rl.planning.costs import Costs
from megatron_async_rl.planning.lengths import Lengths, log_normal
from megatron_async_rl.planning.predict import Load, Prediction, average, predict, workload_of
from megatron_async_rl.planning.simulation import Simulation
from megatron_async_rl.planning.steps import Step

PROMPT_TOKENS = 97  # of the planted prompts: 96 words and the end
WARM_UP_STEPS = end_to_end.WARM_UP_STEPS
PREDICTED_ROWS = ("eta0", "overlap", "eta1", "eta2", "eta4", "eta8", "eta8-keep")

# AReaL, arXiv 2505.24298: DeepSeek-R1-Distill-Qwen-1.5B, 512 x 16 samples, 27,648 new tokens,
# 16 nodes of 8 H800, three quarters of which generate. Figure 5c, trained tokens/s.
SWEEP = {0: 128_700, 1: 269_300, 2: 356_600, 4: 356_600, 8: 371_700, 16: 382_400}
# Table 1 has 41.0 h (eta 0) and 14.8 h (eta 8) for 250 steps: 2.77, the ratio 356,600 / 128,700 of
# figure 5c, so both are the same runs, and a step of 590 s at 128,700 tokens/s trains 8,192 samples
# of 9,270 tokens. The spread of lengths is not published: log-normal with sigma 1.
SWEEP_MEAN, SWEEP_LONGEST, SWEEP_PROMPT = 9270, 27648, 150
DISTILL_QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 1536,
    "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    run: str
    name: str
    measured: float
    predicted: float
    digits: int = 1
    is_share: bool = False  # its error is in points and not in the median
    is_used: bool = False  # for a constant

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    def row(self) -> str:
        measured, predicted = (
            f"{value:.0%}" if self.is_share else f"{value:,.{self.digits}f}"
            for value in (self.measured, self.predicted)
        )
        if self.is_share:
            error = f"{100 * (self.predicted - self.measured):+.0f} points"
        else:
            error = f"{self.error:+.0%}"
        used = " (used for a constant)" if self.is_used else ""
        return f"| {self.run} | {self.name} | {measured} | {predicted} | {error}{used} |"


def table(title: str, figures: list[Figure]) -> str:
    counted = [abs(f.error) for f in figures if not f.is_share and not f.is_used]
    return "\n".join(
        [
            f"{title}: {len(counted)} figures, median error {statistics.median(counted):.1%}, "
            f"largest {max(counted):.0%}",
            "",
            "| run | figure | measured | predicted | error |",
            "|---|---|---|---|---|",
            *(figure.row() for figure in figures),
            "",
        ]
    )


# ---- runs of tools/bench/bench_end_to_end.py


@dataclass(frozen=True)
class Planted:
    """A run with planted lengths on two GPUs, as it was measured."""

    folder: Path
    shape: str
    workload: str
    row: str
    steps: int
    overrides: tuple[str, ...] = ("rollout.kv_lease_limit=null",)  # of runs before it existed
    gpu: str = "h100"

    def config(self) -> Config:
        arguments = argparse.Namespace(
            workload=self.workload, concurrent=256, steps=self.steps, cpu=False,
            overrides=list(self.overrides),
        )  # fmt: skip
        return configuration.from_tree(end_to_end.settings(self.folder, self.row, arguments))

    def costs(self) -> Costs:
        config = self.config()
        return analytic.costs(config, HfConfig(config.model.path), hardware.gpu(self.gpu))

    def load(self) -> Load:
        mean, most = end_to_end.WORKLOADS[self.workload][:2]
        os.environ["PLANTED_MEAN"], os.environ["PLANTED_MAX"] = str(mean), str(most)
        arguments = argparse.Namespace(workload=self.workload)
        lengths = np.array(end_to_end.planned_lengths(arguments))
        return Load(Lengths(np.full(len(lengths), PROMPT_TOKENS), lengths))

    def simulated(self, is_cut_off: bool = False) -> list[Step]:
        """Returns the steps after the warm-up; `is_cut_off`: of a run that would go on."""
        workload = workload_of(self.config(), self.load())
        if is_cut_off:
            workload = replace(workload, settings=replace(workload.settings, steps=1000))
        steps = Simulation(workload, self.costs()).steps()
        return list(itertools.islice(steps, self.steps))[WARM_UP_STEPS:]

    def half_batch_s(self) -> float:
        """Returns the seconds in which one server generates half of a batch to its end."""
        workload = workload_of(self.config(), self.load())
        half = workload.settings.prompts_per_step // 2
        settings = replace(workload.settings, prompts_per_step=half)
        steps = Simulation(replace(workload, settings=settings), self.costs()).steps()
        return statistics.fmean(step.wait_s for step in itertools.islice(steps, 1, 6))


# docs/results/2026-11-end-to-end.md, five of seven steps: step s, tokens/s, waits, proximal, train,
# server idle, over eta0, over ideal, staleness; and half a batch s, trained tokens/s of the trainer
# and of ideal sync
Measured = dict[str, tuple[float, ...]]
SMALL: Measured = {
    "eta0": (11.4, 12_078, 0.73, 0.07, 0.20, 0.25, 1.00, 0.65, 0),
    "overlap": (8.0, 17_103, 0.00, 0.08, 0.25, 0.07, 1.42, 0.92, 1),
    "eta4": (5.1, 28_399, 0.42, 0.14, 0.42, 0.13, 2.35, 1.53, 2.45),
    "bounds": (5.90, 45_624, 18_575),
}
BALANCED: Measured = {
    "eta0": (11.2, 8_524, 0.63, 0.07, 0.29, 0.365, 1.00, 0.70, 0),
    "eta8": (4.5, 21_785, 0.06, 0.22, 0.68, 0.017, 2.56, 1.80, 3.16),
    "bounds": (5.87, 23_824, 12_125),
}
BALANCED_H100: Measured = {
    "eta0": (11.9, 8_019, 0.66, 0.07, 0.26, 0.340, 1.00, 0.72, 0),
    "overlap": (7.7, 12_408, 0.00, 0.10, 0.39, 0.007, 1.55, 1.12, 1),
    "eta1": (7.6, 12_560, 0.49, 0.11, 0.38, 0.123, 1.57, 1.13, 0.94),
    "eta2": (5.7, 17_465, 0.29, 0.14, 0.54, 0.009, 2.18, 1.57, 1.86),
    "eta4": (6.3, 16_635, 0.32, 0.14, 0.51, 0.011, 2.07, 1.50, 3.04),
    "eta8": (4.6, 21_186, 0.12, 0.20, 0.65, 0.015, 2.64, 1.91, 3.15),
    "eta8-keep": (5.0, 19_365, 0.21, 0.17, 0.60, 0.011, 2.41, 1.74, 2.87),
    "bounds": (6.68, 24_573, 11_098),
}
TRAINING_H100: Measured = {
    "eta0": (8.8, 8_395, 0.56, 0.10, 0.33, 0.431, 1.00, 0.62, 0),
    "eta8-keep": (3.9, 18_632, 0.01, 0.21, 0.74, 0.013, 2.22, 1.38, 2.68),
    "bounds": (3.63, 19_710, 13_464),
}


def whole_runs(
    runs: dict[str, Planted], measured: Measured, is_cut_off: bool = False
) -> list[Figure]:
    """Compares runs of bench_end_to_end.py, of which one is `eta0`, by row."""
    steps = {row: run.simulated(is_cut_off) for row, run in runs.items()}
    found = {row: average(steps[row]) for row in runs}
    eta0 = steps["eta0"]
    half_s = runs["eta0"].half_batch_s()
    ideal, trainer = ideal_rate(half_s, eta0), mean_of(eta0, "trained_tokens") / busy_s(eta0)
    bounds = measured["bounds"]
    figures = [
        Figure("server alone", "half a batch to its end, s", bounds[0], half_s, 2),
        Figure("trainer alone", "trained tokens/s", bounds[1], trainer, 0),
        Figure("ideal sync", "trained tokens/s", bounds[2], ideal, 0),
    ]
    for row in runs:
        values = measured[row]
        predicted, rate = found[row], found[row].trained_tokens_per_s
        mean_s = predicted.step_s
        figures += [
            Figure(row, "step s", values[0], mean_s),
            Figure(row, "trained tokens/s", values[1], rate, 0),
            Figure(row, "trainer waits", values[2], predicted.trainer_idle, is_share=True),
            *(
                Figure(row, name, value, mean_of(steps[row], part) / mean_s, is_share=True)
                for name, value, part in (
                    ("proximal", values[3], "proximal_s"),
                    ("train", values[4], "train_s"),
                )
            ),
            Figure(row, "server idle", values[5], predicted.server_idle, is_share=True),
        ]
        if row != "eta0":
            over = rate / found["eta0"].trained_tokens_per_s
            figures.append(Figure(row, "over eta0", values[6], over, 2))
        figures.append(Figure(row, "over ideal sync", values[7], rate / ideal, 2))
        if values[8] > 1:
            figures.append(Figure(row, "mean staleness", values[8], predicted.mean_staleness, 2))
    return figures


def predictions(folder: Path, workload: str) -> str:
    """Returns the table of all rows of a workload: 1.7B shape, two H100."""
    lines = [
        "| row | step s | trained tokens/s | trainer waits | staleness | over eta0 | over ideal |",
        "|---|---|---|---|---|---|---|",
    ]
    eta0, ideal = 0.0, 0.0
    for row in PREDICTED_ROWS:
        run = Planted(folder, "1.7b", workload, row, 7, ())
        steps = run.simulated(is_cut_off=True)
        found = average(steps)
        if row == "eta0":
            eta0, ideal = found.trained_tokens_per_s, ideal_rate(run.half_batch_s(), steps)
        rate = found.trained_tokens_per_s
        lines.append(
            f"| {row} | {found.step_s:.1f} | {rate:,.0f} | {found.trainer_idle:.0%} | "
            f"{found.mean_staleness:.2f} | {rate / eta0:.2f} | {rate / ideal:.2f} |"
        )
    return "\n".join(lines)


def ideal_rate(half_batch_s: float, eta0: list[Step]) -> float:
    """Returns tokens/s of a synchronous step in which two GPUs share both tasks at no cost."""
    return mean_of(eta0, "trained_tokens") / (half_batch_s + busy_s(eta0) / 2)


def busy_s(steps: list[Step]) -> float:
    """Returns the trainer's seconds in a step."""
    return mean_of(steps, "proximal_s") + mean_of(steps, "train_s")


def generation_bound(folder: Path) -> list[Figure]:
    """First runs of the product (commit 8276fa0, 2026-11-25): 1.7B shape, generation-bound.

    The figures are of steady steps, before the last steps of the runs, which admit nothing more.
    """
    setting = ("rollout.kv_lease_limit=null", "sglang.mem_fraction_static=0.7")
    runs = {
        row: Planted(folder, "1.7b", "generation-long", row, 8, setting) for row in ("eta0", "eta4")
    }
    steps = {row: run.simulated(is_cut_off=True) for row, run in runs.items()}
    found = {row: average(steps[row]) for row in runs}
    costs = runs["eta4"].costs()
    full = 0.9 * costs.kv_tokens  # as the server reported
    decode = 256 / costs.decode.seconds(256, full)
    prefill_s = prefill_of_running_s(runs["eta4"].load().lengths, costs, 430_000)
    over = found["eta4"].trained_tokens_per_s / found["eta0"].trained_tokens_per_s
    return [
        Figure("eta0", "step s (80 to 86)", 83, found["eta0"].step_s),
        Figure("eta0", "trained tokens/s", 5_700, found["eta0"].trained_tokens_per_s, 0),
        Figure("eta0", "trainer waits s", 61, mean_of(steps["eta0"], "wait_s")),
        Figure("eta4", "step s (45 to 62)", 53.5, found["eta4"].step_s),
        Figure("eta4", "trained tokens/s", 9_100, found["eta4"].trained_tokens_per_s, 0),
        Figure("eta4", "trainer waits s (24 to 41)", 32.5, mean_of(steps["eta4"], "wait_s")),
        Figure("eta4", "over eta0", 1.59, over, 2),
        Figure("eta4", "decode tokens/s, 256 running, KV 90 % full", 10_400, decode, 0),
        Figure("eta0", "tokens/s of the last sample, 8k tokens", 200,
               costs.decode.tokens_per_s(1, 8192), 0),
        Figure("eta4", "prefill of 430k tokens after an update, s", 5.5, prefill_s, is_used=True),
    ]  # fmt: skip


def prefill_of_running_s(lengths: Lengths, costs: Costs, tokens: int) -> float:
    """Returns the seconds to prefill running samples that hold so many tokens together.

    The age of a running sample has the mean E[L^2] / 2 E[L] and the mean square E[L^3] / 3 E[L].
    """
    response = lengths.response_tokens.astype(float)
    age, square = ((response**k).mean() / (k * response.mean()) for k in (2, 3))
    context = PROMPT_TOKENS + age
    pairs = (PROMPT_TOKENS**2 + 2 * PROMPT_TOKENS * age + square) / context
    return tokens * (costs.prefill.token_s + costs.prefill.token_pair_s * pairs)


def mean_of(steps: list[Step], name: str) -> float:
    return statistics.fmean(getattr(step, name) for step in steps)


# ---- the published sweep


def sweep(folder: Path) -> tuple[list[Figure], list[Figure]]:
    """Returns the absolute figures and the ratios to eta 0."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DISTILL_QWEN))
    load, hf = Load(log_normal(SWEEP_MEAN, SWEEP_LONGEST, SWEEP_PROMPT)), HfConfig(folder)
    found: dict[int, Prediction] = {}
    for eta in SWEEP:
        config = sweep_config(folder, eta)
        costs = analytic.costs(config, hf, hardware.gpu("h800"), hardware.OLDER_ENGINE)
        found[eta] = predict(config, costs, load)
    rates = {eta: predicted.trained_tokens_per_s for eta, predicted in found.items()}
    absolute = [
        Figure(f"eta {eta}", "trained tokens/s", SWEEP[eta], rate, 0) for eta, rate in rates.items()
    ]
    ratios = [
        Figure(f"eta {eta}", "over eta 0", SWEEP[eta] / SWEEP[0], rate / rates[0], 2)
        for eta, rate in rates.items()
        if eta
    ]
    return absolute, ratios


def sweep_config(folder: Path, eta: int) -> Config:
    tree: dict[str, Any] = {
        "run": {"dir": "unused", "steps": 250},
        "model": {"path": str(folder), "context_tokens": 32768},
        "data": {"train": "unused"},
        "rollout": {
            "servers": 96,
            "max_new_tokens": SWEEP_LONGEST,
            "max_concurrent_samples": 96,  # AReaL: 512 groups in flight, 85 samples a server
            "kv_lease_limit": None,
        },
        "algorithm": {"prompts_per_step": 512, "samples_per_prompt": 16, "minibatches": 4},
        "staleness": {"max_staleness": eta},
        "trainer": {"data_parallel_size": 32, "max_tokens_per_microbatch": 32768},
        "sglang": {"mem_fraction_static": 0.8},
    }
    return configuration.from_tree(tree)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--predict", choices=end_to_end.WORKLOADS, metavar="WORKLOAD")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in ("0.6b", "1.7b"):
            end_to_end.make_inputs(folder / shape, shape)
        if arguments.predict:
            print(predictions(folder / "1.7b", arguments.predict))
            return
        rows = ("eta0", "overlap", "eta4")
        small = whole_runs(
            {row: Planted(folder / "0.6b", "0.6b", "balanced-600", row, 7) for row in rows}, SMALL
        )
        print(table("0.6B, mean length 600, 2 H100", small), flush=True)
        balanced: list[Figure] = []
        for workload, gpu, measured in (
            ("balanced", "h200", BALANCED),
            ("balanced", "h100", BALANCED_H100),
            ("training", "h100", TRAINING_H100),
        ):
            runs = {
                row: Planted(folder / "1.7b", "1.7b", workload, row, 7, (), gpu)
                for row in measured
                if row != "bounds"
            }
            found = whole_runs(runs, measured, is_cut_off=True)
            print(table(f"1.7B, {workload}, 2 {gpu.upper()}", found), flush=True)
            balanced += found
        large = generation_bound(folder / "1.7b")
        print(table("1.7B, generation-bound, 2 H100", large), flush=True)
        absolute, ratios = sweep(folder / "distill")
        print(table("AReaL's sweep, 128 H800", absolute))
        print(table("The same, over eta 0", ratios))
        print(table("All", small + balanced + large + absolute + ratios).splitlines()[0])


if __name__ == "__main__":
    main()
