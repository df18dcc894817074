"""Random training samples."""

from __future__ import annotations

import numpy as np

from megatron_async_rl.protocol.types import TrainSample


def make_train_samples(count: int, bad: float = 0.0) -> list[TrainSample]:
    """Returns the same samples of 3 to 29 tokens at each call; `bad` is added to advantages."""
    rng = np.random.default_rng(0)
    out = []
    for length in rng.integers(3, 30, count):
        versions = np.where(np.arange(length) < 2, -1, 4).astype(np.int32)
        logprobs = (-3 + 0.1 * rng.normal(size=length)).astype(np.float32)
        advantages = np.full(length, rng.normal() + bad, np.float32)
        out.append(
            TrainSample(
                rng.integers(0, 30, length).astype(np.int32), logprobs, versions, advantages
            )
        )
    return out
