"""Generalized advantage estimation over the tokens or turns of packed samples; the value loss.

Suffixes: T positions of a micro-batch, each aligned with the token that it predicts; K generated
tokens only; A actions (tokens or turns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_async_rl.trainer.data.sample_index import SampleIndex

SUMS = tuple("value_loss tokens value return return_squared error_squared value_clipped".split())


def generalized_advantages(
    values_T: Tensor,
    rewards_T: Tensor,
    mask_T: Tensor,
    sample_index: SampleIndex,
    gamma: float,
    gae_lambda: float,
    of_turns: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns (advantages [T], returns [T]) in float64, 0 where the mask is False.

    The actions of a sample are its masked tokens in order; tokens between them (other turns) do not
    count. With t their index, V_t the value before token t, V = 0 after the last, r_t the reward:

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = sum over k >= t of (gamma lambda)^(k - t) delta_k
        R_t     = A_t + V_t                                              target of the critic

    With V = 0 and gamma = lambda = 1, A_t is the sum of the rewards from t on. A truncated sample
    is not bootstrapped. Source: J. Schulman et al., arXiv 1506.02438, eq. 11-16.

    `of_turns`: the actions are the runs of adjacent masked tokens. Then V_t is the value before the
    first token of turn t, r_t the sum of the rewards of its tokens, and all its tokens have A_t and
    R_t. Source: turn-PPO, J. Li et al., arXiv 2512.17008.
    """
    taken = mask_T.nonzero()[:, 0]
    advantages_T = torch.zeros_like(values_T, dtype=torch.float64)
    if not len(taken):
        return advantages_T, advantages_T.clone()
    sample_K = sample_index.sample_T[taken]
    first_K = torch.ones_like(taken, dtype=torch.bool)  # of an action
    if of_turns:
        first_K[1:] = (taken.diff() > 1) | (sample_K.diff() != 0)
    action_K = first_K.cumsum(0) - 1
    values_A, sample_A = values_T[taken][first_K].double(), sample_K[first_K]
    rewards_A = torch.zeros_like(values_A).index_add(0, action_K, rewards_T[taken].double())
    next_values_A = torch.where(is_last(sample_A), 0.0, values_A.roll(-1))
    delta_A = rewards_A + gamma * next_values_A - values_A
    advantages_A = discounted_sums(delta_A, sample_A, gamma * gae_lambda)
    returns_T = advantages_T.clone()
    advantages_T[taken] = advantages_A[action_K]
    returns_T[taken] = (advantages_A + values_A)[action_K]
    return advantages_T, returns_T


def is_last(sample_K: Tensor) -> Tensor:
    """Returns where an entry is the last of its sample [K] bool; samples are contiguous."""
    end = sample_K.new_ones(min(1, len(sample_K)), dtype=torch.bool)
    return torch.cat([sample_K[1:] != sample_K[:-1], end])


def discounted_sums(x_K: Tensor, sample_K: Tensor, factor: float) -> Tensor:
    """Returns at entry t the sum of factor^(k - t) x_k over it and its sample's later entries [K].

    After pass n each entry holds the sum over 2^n entries, so 32k tokens take 15 passes instead of
    32k steps. Source: W. D. Hillis, G. L. Steele, "Data parallel algorithms", 1986.
    """
    span = 1
    while span < len(x_K):
        reach = torch.where(sample_K[:-span] == sample_K[span:], x_K[span:], 0.0)
        x_K = torch.cat([x_K[:-span] + factor**span * reach, x_K[-span:]])
        span *= 2
    return x_K


def value_loss(
    values_T: Tensor, old_T: Tensor, returns_T: Tensor, mask_T: Tensor, clip_eps: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss summed over the masked tokens, SUMS over them).

    The loss of a token with value v, value v_old before this training step, and return R is

        1/2 max((v - R)^2, (v_old + clip(v - v_old, -eps, eps) - R)^2)

    Source: J. Schulman et al., arXiv 1707.06347, and its code. The caller normalizes as for the
    policy.
    """
    # As in the policy's loss: masked tokens reach neither the sums nor the gradient.
    values_T = torch.where(mask_T, values_T, 0.0)
    old_T, returns_T = torch.where(mask_T, old_T, 0.0), torch.where(mask_T, returns_T, 0.0)
    error_T = (values_T - returns_T).square()
    objective_T = error_T
    if clip_eps is not None:
        clipped_T = old_T + (values_T - old_T).clamp(-clip_eps, clip_eps)
        objective_T = torch.maximum(error_T, (clipped_T - returns_T).square())
    loss = objective_T.sum() / 2
    with torch.no_grad():
        sums = {
            "value_loss": loss,
            "tokens": mask_T,
            "value": values_T,
            "return": returns_T,
            "return_squared": returns_T.double().square(),
            "error_squared": error_T.double(),
            "value_clipped": objective_T > error_T,
        }
        return loss, {name: value.sum() for name, value in sums.items()}
