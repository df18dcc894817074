"""A cut batch to one share per data-parallel rank: equal counts, tokens as even as that allows."""

from __future__ import annotations

import numpy as np

from megatron_async_rl.protocol.types import Sample, TrainSample


def balanced_shares(samples: list[TrainSample], num_shares: int) -> list[list[TrainSample]]:
    """Longest first, each to the share with the fewest tokens that is not full yet.

    The number of samples must divide by `num_shares`: every rank then makes the same number of minibatches.
    """
    share_size, rest = divmod(len(samples), num_shares)
    if rest:
        raise ValueError(f"{len(samples)} samples do not divide into {num_shares} equal shares")
    shares: list[list[TrainSample]] = [[] for _ in range(num_shares)]
    tokens = [0] * num_shares
    for sample in sorted(samples, key=lambda s: len(s.ids), reverse=True):
        lightest = min(
            (i for i in range(num_shares) if len(shares[i]) < share_size), key=lambda i: tokens[i]
        )
        shares[lightest].append(sample)
        tokens[lightest] += len(sample.ids)
    return shares


def train_sample(sample: Sample, advantage: float) -> TrainSample:
    """The sample as the trainer takes it, its advantage on every token."""
    advantages = np.full(len(sample.ids), advantage, np.float32)
    return TrainSample(
        ids=sample.ids, logprobs=sample.logprobs, versions=sample.versions, advantages=advantages
    )
