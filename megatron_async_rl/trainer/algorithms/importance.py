"""Between policies: the proximal one's logprobs, and the weight of samples that an older one made.

Suffixes: T tokens of a packed micro-batch, N samples in it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_async_rl.config.algorithm import AlgorithmConfig


@dataclass(frozen=True, slots=True)
class Owners:
    """Which sample each token of the pack belongs to."""

    sample_T: Tensor  # int64, 0 <= it < count
    count: int
    total: Callable[[Tensor], Tensor] = lambda sums: sums
    """Sums over the ranks that hold the other tokens of these samples; differentiable."""

    def sums(self, x_TC: Tensor) -> Tensor:
        """[N, C]"""
        return self.total(
            x_TC.new_zeros(self.count, *x_TC.shape[1:]).index_add(0, self.sample_T, x_TC)
        )

    def means(self, x_T: Tensor, mask_T: Tensor) -> Tensor:
        """[T]: at each token, the mean of x over the masked tokens of its sample, or 0 of none. Differentiable."""
        sums_N, counts_N = self.sums(
            torch.stack([torch.where(mask_T, x_T, 0.0), mask_T.to(x_T.dtype)], 1)
        ).unbind(1)
        return (sums_N / counts_N.clamp(min=1))[self.sample_T]


def loglinear_proximal(logprobs_T: Tensor, behavior_T: Tensor, lag_T: Tensor) -> Tensor:
    """Proximal logprobs with no forward pass: on the line from behavior to current policy, by versions (A-3PO).

    alpha = (v_proximal - v_behavior) / (v_current - v_behavior), proximal = behavior + alpha (current - behavior), where
    v_current = v_proximal + 1 is the version under training: alpha = lag / (lag + 1) with lag = v_proximal - v_behavior.
    """
    alpha_T = lag_T.clamp(min=0) / (lag_T.clamp(min=0) + 1)
    return behavior_T + alpha_T * (logprobs_T.detach() - behavior_T)


def behavior_weights(
    proximal_T: Tensor,
    behavior_T: Tensor,
    mask_T: Tensor,
    owners: Owners | None,
    config: AlgorithmConfig,
) -> tuple[Tensor, Tensor]:
    """(weight [T], kept [T] bool): w = pi_proximal / pi_behavior, and where it is trusted; detached inputs.

    Level: token, w itself, or sequence, the geometric mean exp(mean log w) over the sample at each of its tokens. Beyond
    the cap or below the floor, action mask drops the token (MIS), truncate clamps the weight (TIS).
    """
    log_T = torch.where(mask_T, proximal_T - behavior_T, 0.0)
    if config.staleness_correction.behavior_weight_level == "sequence":
        assert owners is not None
        log_T = owners.means(log_T, mask_T)
    w_T = torch.where(mask_T, log_T.exp(), 1.0)
    floor, cap = (
        config.staleness_correction.behavior_weight_floor,
        config.staleness_correction.behavior_weight_cap,
    )
    if config.staleness_correction.behavior_weight_action == "truncate":
        return w_T.clamp(floor, cap) if (floor, cap) != (None, None) else w_T, mask_T
    keep_T = mask_T
    if cap is not None:
        keep_T = keep_T & (w_T <= cap)
    if floor is not None:
        keep_T = keep_T & (w_T >= floor)
    return w_T, keep_T


def second_moment_cutoff(
    squares: Tensor, threshold: float, total: Callable[[Tensor], Tensor] = lambda sums: sums
) -> float:
    """M2PO's mask: tokens with larger squared log ratios than this are left out (H. Zheng et al., "Prosperity before
    collapse: how far can off-policy RL reach with stale data on LLMs?", 2025).

    The paper takes the largest (log pi / pi_behavior)^2 out, one after another, until the mean of the rest is at most
    the threshold. The mean of what is at most x grows with x, so the largest such x is found by bisection, exactly: over
    the bits of a float32, whose order is that of the numbers. squares: float32 >= 0, this rank's tokens; `total` sums
    [sum, count] over the ranks. All of equal size go together, and infinity is always left out.
    """
    low, high = (
        0,
        _INFINITY_BITS,
    )  # the cutoff is at least low, less than high, as the bits of a float32
    while high - low > 1:
        middle = (low + high) // 2
        kept = squares[squares <= _float_of(middle)].double()
        summed, count = total(torch.stack([kept.sum(), kept.new_tensor(float(len(kept)))])).tolist()
        low, high = (middle, high) if summed <= threshold * count else (low, middle)
    return _float_of(low)


_INFINITY_BITS = 0x7F800000


def _float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def kl_reward_to_go(
    behavior_T: Tensor, reference_T: Tensor, mask_T: Tensor, owners: Owners
) -> Tensor:
    """[T]: sum over this and the later generated tokens of the sample of log pi_behavior - log pi_reference.

    It is what beta times is taken from each token's advantage where the KL is part of the reward (gamma = lambda = 1).
    Of a whole pack (data.whole): the order of the tokens counts.
    """
    kl_T = torch.where(mask_T, behavior_T - reference_T, 0.0).double()
    before_T = kl_T.cumsum(0) - kl_T  # of all earlier tokens in the pack
    ends_N = owners.sums(kl_T).cumsum(0)
    return torch.where(mask_T, ends_N[owners.sample_T] - before_T, 0.0).to(behavior_T.dtype)
