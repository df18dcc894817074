"""The costs that a simulated run is made of: seconds of decoding, prefill, training and updates.

analytic.py computes them from model sizes and hardware; calibration.py takes them from a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeCosts:
    """One decode step of a server, which gives each running sample a token."""

    step_s: float  # however small the batch
    sample_s: float  # for each running sample
    context_token_s: float  # for each token of KV cache that the step reads

    def seconds(self, num_samples: float, context: float) -> float:
        """Returns the seconds of one step; `context`: tokens of all running samples together."""
        return self.step_s + num_samples * self.sample_s + context * self.context_token_s

    def tokens_per_s(self, num_samples: float, mean_context: float) -> float:
        """Returns the rate of a server that runs this many samples of this mean length."""
        return num_samples / self.seconds(num_samples, num_samples * mean_context)


@dataclass(frozen=True)
class PrefillCosts:
    token_s: float
    token_pair_s: float = 0.0  # for each squared token of a sample: attention

    def seconds(self, num_tokens: float) -> float:
        """Returns the seconds to prefill one sample of this many tokens."""
        return self.token_s * num_tokens + self.token_pair_s * num_tokens**2


@dataclass(frozen=True)
class TrainCosts:
    """A training step: micro-batches on each replica, then an optimizer step per minibatch.

    Times are those of one replica; a pipeline of p stages idles for (p - 1) / (p - 1 + m) of a
    minibatch of m micro-batches.
    """

    token_s: float
    token_pair_s: float = 0.0  # for each squared token of a sample: attention
    microbatch_s: float = 0.0  # least time of one
    microbatch_tokens: float = math.inf
    minibatches: int = 1
    minibatch_s: float = 0.0  # gradients and optimizer
    forward_passes: float = 0.0  # before training: proximal, reference
    replicas: float = 1  # less than 1 in a simulation of a part
    pipeline_stages: float = 1.0  # over the chunks of a stage

    def seconds(self, lengths: Sequence[int]) -> tuple[float, float]:
        """Returns the seconds of the forward passes before training, and of training.

        `lengths`: tokens of each sample of the batch, prompt included.
        """
        tokens = sum(lengths) / self.replicas
        pairs = sum(length * length for length in lengths) / self.replicas
        per_minibatch = max(1, math.ceil(tokens / self.minibatches / self.microbatch_tokens))
        count = per_minibatch * self.minibatches
        compute_s = (tokens * self.token_s + pairs * self.token_pair_s) / count
        bubble = 1 + (self.pipeline_stages - 1) / per_minibatch
        one_s = max(compute_s, self.microbatch_s) * bubble
        return (
            count * self.forward_passes * one_s / 3,
            count * one_s + self.minibatches * self.minibatch_s,
        )


@dataclass(frozen=True)
class Costs:
    decode: DecodeCosts
    prefill: PrefillCosts
    train: TrainCosts
    update_s: float  # the servers generate nothing meanwhile
    kv_tokens: float  # that fit into a server's KV cache
    score_s: float = 0.0  # from a sample's end to its score
    between_steps_s: float = 0.0  # of the trainer, beside training, update and waiting
