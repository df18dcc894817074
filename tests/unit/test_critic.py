"""From the batch to the critic's advantages and targets, on one rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from config_builders import algorithm_config

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

from megatron_async_rl.controller.delivery import train_samples
from megatron_async_rl.controller.turns import Turns, rewards_at_ends
from megatron_async_rl.protocol.types import NOT_GENERATED, Sample
from megatron_async_rl.trainer.algorithms import critic
from megatron_async_rl.trainer.data.microbatch import Packing, pack

PACKING = Packing(budget=64, tp=1, device=torch.device("cpu"), thd=False, dense=True)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # tokens 2, 3 | 6 and 1 | 3: by hand with the values 0.5 of all tokens, gamma = lambda = 0.5
        ("turn_gae", [1 + 0.25 - 0.5 + 0.25 * 3.5] * 2 + [4 - 0.5]),
        ("gae", None),
    ],
)
def test_rewards_of_turns_reach_the_turns(estimator: str, expected: list[float] | None) -> None:
    versions = np.array([NOT_GENERATED, NOT_GENERATED, 0, 0, NOT_GENERATED, NOT_GENERATED, 0])
    sample = Sample(
        np.arange(7, dtype=np.int32),
        np.zeros(7, np.float32),
        versions.astype(np.int32),
        "stop",
        "",
    )
    turns = Turns(np.array([1.0, 4.0]), np.array([2, 6]), np.array([2, 1]))
    microbatch = pack(train_samples(sample, rewards_at_ends(sample, turns)) * 2, 0, PACKING)
    algorithm = algorithm_config(
        prompts_per_step=1, samples_per_prompt=2, advantage=estimator, gamma=0.5, gae_lambda=0.5
    )
    values_T = torch.full((14,), 0.5)
    estimated = critic._estimated(microbatch, values_T, algorithm)
    if expected is None:  # token by token: 3.5, 1 + 0.25 - 0.5 + 0.25 * 3.5, ...
        last = 4 - 0.5
        second = 1 + 0.25 - 0.5 + 0.25 * last
        expected = [0.25 - 0.5 + 0.25 * second, second, last]
    assert estimated.advantages_T[microbatch.mask_T].tolist() == pytest.approx(expected * 2)
    assert estimated.returns_T is not None
    targets = [advantage + 0.5 for advantage in expected] * 2
    assert estimated.returns_T[microbatch.mask_T].tolist() == pytest.approx(targets)
