"""The decoupled PPO objective (AReaL, eq. 5), as sums over the tokens of one packed micro-batch.

With m the loss mask, A the advantage, and logprobs of the token under three policies (behavior: that sampled it;
proximal: the weights this training step began with; current):

    u = exp(current - proximal)               the ratio that is clipped
    w = exp(proximal - behavior), detached    corrects for old samples; w := 0 where it exceeds the cap
    L = sum m * w * max(-A * u, -A * clip(u, 1 - eps, 1 + eps_high)) / N

N, the global number of loss tokens of the minibatch, is counted before the cap removes any, and divided by elsewhere
(finalize_model_grads): then neither the cut into micro-batches nor the layout changes the result.
`ppo`, the naive loss: u against the behavior policy, w = 1.

Suffix T: tokens of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_async_rl.config import AlgorithmConfig


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Everything aligned at the position that predicts the token; values where the mask is False do not matter."""

    logprobs_T: Tensor  # current policy; gradients flow through it
    entropy_T: Tensor  # current policy
    proximal_T: Tensor | None  # None: the current one (one minibatch: no step lies between them) and for `ppo`
    behavior_T: Tensor
    advantages_T: Tensor
    mask_T: Tensor  # bool
    current_T: Tensor  # bool: sampled by the version now trained, where trainer and engine should agree


SUMS = (
    "loss",
    "tokens",
    "entropy",
    "approx_kl",
    "behavior_approx_kl",
    "importance_weight",
    "behavior_weight",
    "clipped",
    "dual_clipped",
    "masked_by_cap",
    "current_tokens",
    "logprob_diff",
)
MAXIMA = ("importance_weight_max", "behavior_weight_max", "logprob_diff_max")


def ppo_loss(inputs: LossInputs, config: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss summed over the masked tokens, metrics: the SUMS and MAXIMA above over the masked tokens).

    The two KL figures are means of log ratios, old - new on tokens sampled by the old: they can be negative.
    """
    # Masked values become 0 before any exp: whatever stands in padding, inf and nan too, then reaches neither the loss
    # nor, through 0 * inf, the gradient.
    mask_T = inputs.mask_T
    logprobs_T = torch.where(mask_T, inputs.logprobs_T, 0.0)
    behavior_T = torch.where(mask_T, inputs.behavior_T, 0.0)
    advantages_T = torch.where(mask_T, inputs.advantages_T, 0.0)
    proximal_T = logprobs_T.detach() if inputs.proximal_T is None else torch.where(mask_T, inputs.proximal_T, 0.0)
    keep_T, w_T = mask_T, torch.ones_like(behavior_T)
    if config.loss == "ppo":
        old_T = behavior_T
    else:
        old_T = proximal_T
        w_T = (proximal_T - behavior_T).exp()
        if config.behavior_weight_cap is not None:
            keep_T = mask_T & (w_T <= config.behavior_weight_cap)

    eps, eps_high = config.clip_eps, config.clip_eps_high or config.clip_eps
    u_T = (logprobs_T - old_T).exp()
    plain_T, clipped_T = -advantages_T * u_T, -advantages_T * u_T.clamp(1 - eps, 1 + eps_high)
    objective_T = torch.maximum(plain_T, clipped_T)
    dual_T = torch.zeros_like(mask_T)
    if config.dual_clip is not None:
        # Bounds the loss of a token with negative advantage whose probability grew a lot; it then has no gradient.
        bound_T = config.dual_clip * advantages_T.abs()
        dual_T = objective_T > bound_T
        objective_T = torch.minimum(objective_T, bound_T)
    loss = torch.where(keep_T, torch.where(keep_T, w_T, 0.0) * objective_T, 0.0).sum()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * torch.where(mask_T, inputs.entropy_T, 0.0).sum()

    with torch.no_grad():
        current_T = mask_T & inputs.current_T
        diff_T = torch.where(current_T, (proximal_T - behavior_T).abs(), 0.0)
        sums = {
            "loss": loss,
            "tokens": mask_T,
            "entropy": torch.where(mask_T, inputs.entropy_T, 0.0),
            "approx_kl": old_T - logprobs_T,
            "behavior_approx_kl": behavior_T - proximal_T,
            "importance_weight": torch.where(mask_T, u_T, 0.0),
            "behavior_weight": torch.where(mask_T, w_T, 0.0),
            "clipped": keep_T & (clipped_T > plain_T),
            "dual_clipped": keep_T & dual_T,
            "masked_by_cap": mask_T & ~keep_T,
            "current_tokens": current_T,
            "logprob_diff": diff_T,
        }
        maxima = {
            "importance_weight_max": torch.where(mask_T, u_T, 0.0),
            "behavior_weight_max": torch.where(mask_T, w_T, 0.0),
            "logprob_diff_max": diff_T,
        }
        metrics = {name: value.sum() for name, value in sums.items()} | {name: v.amax() for name, v in maxima.items()}
    return loss, metrics
