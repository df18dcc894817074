#!/usr/bin/env python3
"""Simulates training that starts the longest prompts of a step first, as in a second epoch.

    python tools/bench/bench_longest_first.py

The controller's core with one simulated server (planning/simulation.py): Qwen3-0.6B on H100, steps
of 32 x 8 samples with log-normal lengths (sigma 1). Prompts have mean lengths of their own (sigma
0.8), known from 8 earlier samples, and the prompts of a step start by these, longest first, or in
the order of the data.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import bench_end_to_end as end_to_end
import numpy as np
from bench_parts import make_parser
from bench_plan import PROMPT_TOKENS, Planted

from megatron_async_rl.planning.costs import Costs
from megatron_async_rl.planning.predict import Prediction, average, workload_of
from megatron_async_rl.planning.simulation import Simulation, Workload
from megatron_async_rl.protocol.types import Prompt

SIGMA_OF_PROMPTS, SIGMA_WITHIN = 0.8, 0.6  # together 1
STEPS, WARM_UP = 24, 6


class SecondEpoch(Simulation):
    """A simulation that draws the prompts of one step at a time."""

    def __init__(self, workload: Workload, costs: Costs, mean: float, longest_first: bool) -> None:
        super().__init__(workload, costs)
        self._mean, self._longest_first = mean, longest_first
        self._step: list[np.ndarray] = []  # lengths of the groups that are left of the step

    def _next_prompt(self) -> Prompt:
        if not self._step:
            settings = self.workload.settings
            shape = settings.prompts_per_step, settings.samples_per_prompt
            of_prompts = SIGMA_OF_PROMPTS * self._rng.standard_normal(shape[0])
            earlier, lengths = (
                np.exp(
                    np.log(self._mean) - 0.5 + of_prompts[:, None]
                    + SIGMA_WITHIN * self._rng.standard_normal(shape)
                ).clip(16, settings.max_new_tokens)
                for _ in range(2)
            )  # fmt: skip
            self._step = list(lengths.astype(int))
            if self._longest_first:
                self._step = [self._step[n] for n in np.argsort(-earlier.mean(axis=1))]
        number = next(self._numbers)
        self._prompts[number] = PROMPT_TOKENS, self._step.pop(0)
        zeros = np.zeros(self._units(PROMPT_TOKENS), np.int32)
        return Prompt(str(number), zeros, {"is_kept": True})


def simulate(run: Planted, concurrent: int, seed: int, longest_first: bool) -> Prediction:
    workload = workload_of(run.config(), run.load())
    settings = replace(workload.settings, steps=end_to_end.ENDLESS)
    workload = replace(
        workload, settings=settings, concurrent=concurrent, max_running=concurrent, seed=seed
    )
    mean = end_to_end.WORKLOADS[run.workload][0]
    steps = SecondEpoch(workload, run.costs(), mean, longest_first).steps()
    return average(list(itertools.islice(steps, STEPS))[WARM_UP:])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    print(
        "| mean length | in flight | eta | tokens/s | longest first | range of seeds | staleness |"
    )
    print("|---:|---:|---:|---:|---:|---|---|")
    with TemporaryDirectory() as name:
        folder = Path(name)
        end_to_end.make_inputs(folder, "0.6b")
        cases = itertools.product(("balanced-600", "generation-long"), (256, 64), (0, 1, 4))
        for workload, concurrent, eta in cases:
            run = Planted(folder, "0.6b", workload, f"eta{eta}", STEPS)
            found = [
                [simulate(run, concurrent, seed, is_first) for is_first in (False, True)]
                for seed in range(1, arguments.seeds + 1)
            ]
            gains = [
                first.trained_tokens_per_s / before.trained_tokens_per_s - 1
                for before, first in found
            ]
            rate = np.mean([before.trained_tokens_per_s for before, _ in found])
            lag = [np.mean([pair[n].mean_staleness for pair in found]) for n in (0, 1)]
            print(
                f"| {end_to_end.WORKLOADS[workload][0]:,} | {concurrent} | {eta} | {rate:,.0f} "
                f"| {np.mean(gains):+.1%} | {min(gains):+.1%} to {max(gains):+.1%} "
                f"| {lag[0]:.2f}, {lag[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
