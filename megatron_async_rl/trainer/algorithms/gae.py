"""Generalized advantage estimation over the generated tokens of packed samples, and the loss of the values it needs.

Suffix T: positions of the pack, each about the token after it (data.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_async_rl.trainer.algorithms.importance import Owners

SUMS = (
    "value_loss",
    "tokens",
    "value",
    "return",
    "return_squared",
    "error_squared",
    "value_clipped",
)


def generalized_advantages(
    values_T: Tensor,
    rewards_T: Tensor,
    mask_T: Tensor,
    owners: Owners,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """(advantages [T], returns [T]) float64, 0 where the mask is False (J. Schulman et al., arXiv 1506.02438, eq. 11-16).

    The actions of a sample are its masked tokens, one after another whatever stands between them (the prompt, other
    turns): with t counting them, V_t the value before token t, V = 0 after the last, and r_t what token t earned,

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = sum over k >= t of (gamma lambda)^(k - t) delta_k
        R_t     = A_t + V_t                                              what the critic is taught

    With V = 0 and gamma = lambda = 1, A_t is the sum of the rewards from t on. A sample cut at its length ends as one
    that stopped does: nothing is bootstrapped.
    """
    taken = mask_T.nonzero()[:, 0]
    advantages_T = torch.zeros_like(values_T, dtype=torch.float64)
    if not len(taken):
        return advantages_T, advantages_T.clone()
    values_K, rewards_K, owner_K = (
        values_T[taken].double(),
        rewards_T[taken].double(),
        owners.sample_T[taken],
    )
    after_K = torch.where(is_last(owner_K), 0.0, values_K.roll(-1))
    delta_K = rewards_K + gamma * after_K - values_K
    advantages_K = discounted_sums(delta_K, owner_K, gamma * gae_lambda)
    returns_T = advantages_T.clone()
    advantages_T[taken], returns_T[taken] = advantages_K, advantages_K + values_K
    return advantages_T, returns_T


def final_rewards(sample_rewards_T: Tensor, mask_T: Tensor, owners: Owners) -> Tensor:
    """[T]: the sample's reward, given on all its tokens, at its last masked one, and 0 elsewhere."""
    taken = mask_T.nonzero()[:, 0]
    last = taken[is_last(owners.sample_T[taken])]
    rewards_T = torch.zeros_like(sample_rewards_T)
    rewards_T[last] = sample_rewards_T[last]
    return rewards_T


def is_last(owner_K: Tensor) -> Tensor:
    """[K] bool: no later entry has the same owner; owners stand together."""
    return torch.cat(
        [owner_K[1:] != owner_K[:-1], owner_K.new_ones(min(1, len(owner_K)), dtype=torch.bool)]
    )


def discounted_sums(x_K: Tensor, owner_K: Tensor, factor: float) -> Tensor:
    """[K]: at entry t the sum of factor^(k - t) x_k over it and the later entries k of its owner.

    By doubling: after pass n each entry has the sum over 2^n entries, so that 32k tokens take 15 passes, not 32k steps
    (W. D. Hillis, G. L. Steele, "Data parallel algorithms", 1986).
    """
    span = 1
    while span < len(x_K):
        reach = torch.where(owner_K[:-span] == owner_K[span:], x_K[span:], 0.0)
        x_K = torch.cat([x_K[:-span] + factor**span * reach, x_K[-span:]])
        span *= 2
    return x_K


def value_loss(
    values_T: Tensor, old_T: Tensor, returns_T: Tensor, mask_T: Tensor, clip_eps: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss summed over the masked tokens, SUMS over them).

    Of a token, with v its value now, v_old the one that the step began with, R its return (J. Schulman et al.,
    arXiv 1707.06347, and the code that goes with it; the caller normalises as for the policy):

        1/2 max((v - R)^2, (v_old + clip(v - v_old, -eps, eps) - R)^2)
    """
    # As in the policy's loss: what stands at masked tokens reaches neither sum nor gradient.
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
