"""Proximal logprobs, and weights of tokens that an older policy sampled.

Suffix T: tokens of a packed micro-batch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.trainer.data.sample_index import SampleIndex

_INFINITY_BITS = 0x7F800000  # of a float32


def loglinear_proximal(logprobs_T: Tensor, behavior_T: Tensor, staleness_T: Tensor) -> Tensor:
    """Returns proximal logprobs [T] without a forward pass, interpolated by version (A-3PO).

        alpha    = (v_proximal - v_behavior) / (v_current - v_behavior)
        proximal = behavior + alpha (current - behavior)

    v_current = v_proximal + 1 is the version in training. With staleness = v_proximal - v_behavior,
    alpha = staleness / (staleness + 1).
    """
    alpha_T = staleness_T.clamp(min=0) / (staleness_T.clamp(min=0) + 1)
    return behavior_T + alpha_T * (logprobs_T.detach() - behavior_T)


def behavior_weights(
    proximal_T: Tensor,
    behavior_T: Tensor,
    mask_T: Tensor,
    sample_index: SampleIndex | None,
    config: AlgorithmConfig,
) -> tuple[Tensor, Tensor]:
    """Returns w = pi_proximal / pi_behavior [T] and which tokens are kept [T] bool.

    Level token: w itself; level sequence: at each token the geometric mean exp(mean log w) over its
    sample. Beyond the cap or below the floor, action mask drops the token (MIS) and action truncate
    clamps the weight (TIS). The inputs carry no gradient.
    """
    correction = config.staleness_correction
    log_T = torch.where(mask_T, proximal_T - behavior_T, 0.0)
    if correction.behavior_weight_level == "sequence":
        assert sample_index is not None
        log_T = sample_index.means(log_T, mask_T)
    w_T = torch.where(mask_T, log_T.exp(), 1.0)
    floor, cap = correction.behavior_weight_floor, correction.behavior_weight_cap
    if correction.behavior_weight_action == "truncate":
        return w_T.clamp(floor, cap) if (floor, cap) != (None, None) else w_T, mask_T
    keep_T = mask_T
    if cap is not None:
        keep_T = keep_T & (w_T <= cap)
    if floor is not None:
        keep_T = keep_T & (w_T >= floor)
    return w_T, keep_T


def second_moment_cutoff(
    squares: Tensor, threshold: float, reduce: Callable[[Tensor], Tensor] = lambda sums: sums
) -> float:
    """Returns M2PO's cutoff: tokens with a larger squared log ratio are masked.

    M2PO removes the largest (log pi / pi_behavior)^2 one after another until the mean of the rest
    is at most `threshold`. The mean of the values up to x grows with x, so bisection finds the
    largest such x, exactly: over the bits of a float32, which sort like its values. Equal values
    are removed together, infinity always.

    `squares`: float32 >= 0, of this rank's tokens. `reduce` sums [sum, count] over the ranks.
    Source: H. Zheng et al., "Prosperity before collapse: how far can off-policy RL reach with stale
    data on LLMs?", 2025.
    """
    low, high = 0, _INFINITY_BITS  # low <= the cutoff's bits < high
    while high - low > 1:
        middle = (low + high) // 2
        kept = squares[squares <= _float_of(middle)].double()
        sums = torch.stack([kept.sum(), kept.new_tensor(float(len(kept)))])
        summed, count = reduce(sums).tolist()
        low, high = (middle, high) if summed <= threshold * count else (low, middle)
    return _float_of(low)


def _float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def kl_reward_to_go(
    behavior_T: Tensor, reference_T: Tensor, mask_T: Tensor, sample_index: SampleIndex
) -> Tensor:
    """Returns the sum of log pi_behavior - log pi_reference over each token and the later ones [T].

    Only generated tokens of the same sample count. Where the KL is part of the reward, kl.coef
    times this is subtracted from the advantage (gamma = lambda = 1). Needs the tokens of the whole
    pack, in order (gather_context_parallel).
    """
    kl_T = torch.where(mask_T, behavior_T - reference_T, 0.0).double()
    before_T = kl_T.cumsum(0) - kl_T  # of all earlier tokens in the pack
    ends_N = sample_index.sums(kl_T).cumsum(0)
    to_go_T = ends_N[sample_index.sample_T] - before_T
    return torch.where(mask_T, to_go_T, 0.0).to(behavior_T.dtype)
