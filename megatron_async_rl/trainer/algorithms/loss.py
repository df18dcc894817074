"""The objectives, as sums over the tokens of one packed micro-batch.

With m the loss mask, A the advantage, and logprobs of the token under three policies (behavior: that sampled it;
proximal: the weights this training step began with; current):

    u = exp(current - proximal)               the ratio that is clipped
    w = exp(proximal - behavior), detached    corrects for old samples; see importance.behavior_weights
    L = sum m * w * objective(u, A) / N

    decoupled_ppo   max(-A u, -A clip(u, 1 - eps, 1 + eps_high))        AReaL, arXiv 2505.24298, eq. 5
    gspo            the same with u = exp(mean of current - proximal over the sample), A its mean     arXiv 2507.18071
    cispo           -A detach(clip(u, 1 - eps, 1 + eps_high)) current   arXiv 2506.13585
    ppo             as decoupled_ppo, naive: u against the behavior policy, w = 1

Dual clip (arXiv 1912.09729) bounds the first two and the last by c |A|. To L come -entropy_coef * entropy and, with
kl_in = loss, kl_coef * KL(current | reference).

N, the global number of loss tokens of the minibatch, is counted before the cap removes any, and divided by elsewhere
(finalize_model_grads): then neither the cut into micro-batches nor the layout changes the result.

Suffix T: tokens of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.trainer.algorithms.importance import (
    Owners,
    behavior_weights,
    loglinear_proximal,
)


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Everything aligned at the position that predicts the token; values where the mask is False do not matter."""

    logprobs_T: Tensor  # current policy; gradients flow through it
    entropy_T: Tensor  # current policy
    proximal_T: (
        Tensor | None
    )  # None: the current one (no step lies between them), or loglinear, or not needed
    behavior_T: Tensor
    advantages_T: Tensor
    mask_T: Tensor  # bool
    lag_T: Tensor  # versions between the one that sampled the token and the one now trained; 0: they should agree
    owners: Owners | None = None  # for gspo and the sequence level
    reference_T: Tensor | None = None  # with kl_coef
    trusted_T: Tensor | None = (
        None  # bool, with m2_threshold: the others are masked, as beyond the cap
    )
    moved: bool = False  # no logprobs of the step's first weights are known: nothing to compare the engine's with


SUMS = (
    "loss",
    "tokens",
    "entropy",
    "approx_kl",
    "behavior_approx_kl",
    "reference_kl",
    "importance_weight",
    "behavior_weight",
    "clipped",
    "dual_clipped",
    "masked_by_cap",
    "current_tokens",
    "compared_tokens",
    "logprob_diff",
    "mismatch_kl",
    "mismatch_beyond_cap",
)
MAXIMA = ("importance_weight_max", "behavior_weight_max", "logprob_diff_max")


def policy_loss(inputs: LossInputs, config: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss summed over the masked tokens, metrics: the SUMS and MAXIMA above over the masked tokens).

    approx_kl and behavior_approx_kl are means of log ratios, old - new on tokens sampled by the old: they can be negative.
    """
    # Masked values become 0 before any exp: whatever stands in padding, inf and nan too, then reaches neither the loss
    # nor, through 0 * inf, the gradient.
    mask_T = inputs.mask_T
    logprobs_T = torch.where(mask_T, inputs.logprobs_T, 0.0)
    behavior_T = torch.where(mask_T, inputs.behavior_T, 0.0)
    advantages_T = torch.where(mask_T, inputs.advantages_T, 0.0)
    if inputs.proximal_T is not None:
        trainer_T = proximal_T = torch.where(mask_T, inputs.proximal_T, 0.0)
    else:
        trainer_T = proximal_T = logprobs_T.detach()
        if config.staleness_correction.proximal == "loglinear" and config.loss.objective != "ppo":
            proximal_T = loglinear_proximal(
                logprobs_T, behavior_T, torch.where(mask_T, inputs.lag_T, 0)
            )
    if config.loss.objective == "ppo":
        old_T, w_T, keep_T = behavior_T, torch.ones_like(behavior_T), mask_T
    else:
        old_T = proximal_T
        w_T, keep_T = behavior_weights(proximal_T, behavior_T, mask_T, inputs.owners, config)

    log_u_T = logprobs_T - old_T
    if config.loss.objective == "gspo":
        assert inputs.owners is not None
        log_u_T = inputs.owners.means(log_u_T, mask_T)
        advantages_T = inputs.owners.means(advantages_T, mask_T)
    if inputs.trusted_T is not None:
        keep_T = keep_T & inputs.trusted_T
    u_T = log_u_T.exp()
    if config.loss.objective == "cispo":
        objective_T, clipped_T, dual_T = _cispo(u_T, logprobs_T, advantages_T, config)
    else:
        objective_T, clipped_T, dual_T = _clipped(u_T, advantages_T, config)
    loss = torch.where(keep_T, torch.where(keep_T, w_T, 0.0) * objective_T, 0.0).sum()
    if config.loss.entropy_coef:
        loss = loss - config.loss.entropy_coef * torch.where(mask_T, inputs.entropy_T, 0.0).sum()
    reference_kl = torch.zeros_like(loss)
    if inputs.reference_T is not None:
        kl_T = _reference_kl(logprobs_T, torch.where(mask_T, inputs.reference_T, 0.0), config)
        reference_kl = kl_T.sum()
        if config.kl.apply_to == "loss":
            loss = loss + config.kl.coef * reference_kl

    with torch.no_grad():
        current_T = mask_T & (inputs.lag_T == 0)
        compared_T = torch.zeros_like(mask_T) if inputs.moved else current_T
        log_w_T = torch.where(compared_T, trainer_T - behavior_T, 0.0)
        beyond_T = torch.zeros_like(mask_T)
        if config.staleness_correction.behavior_weight_cap is not None:
            beyond_T = compared_T & (
                log_w_T.exp() > config.staleness_correction.behavior_weight_cap
            )
        sums = {
            "loss": loss,
            "tokens": mask_T,
            "entropy": torch.where(mask_T, inputs.entropy_T, 0.0),
            "approx_kl": old_T - logprobs_T,
            "behavior_approx_kl": behavior_T - proximal_T,
            "reference_kl": reference_kl,
            "importance_weight": torch.where(mask_T, u_T, 0.0),
            "behavior_weight": torch.where(mask_T, w_T, 0.0),
            "clipped": keep_T & clipped_T,
            "dual_clipped": keep_T & dual_T,
            "masked_by_cap": mask_T & ~keep_T,
            "current_tokens": current_T,
            "compared_tokens": compared_T,
            "logprob_diff": log_w_T.abs(),
            "mismatch_kl": log_w_T.exp() - log_w_T - 1,  # of the engine's policy from the trainer's
            "mismatch_beyond_cap": beyond_T,
        }
        maxima = {
            "importance_weight_max": torch.where(mask_T, u_T, 0.0),
            "behavior_weight_max": torch.where(mask_T, w_T, 0.0),
            "logprob_diff_max": log_w_T.abs(),
        }
        metrics = {name: value.sum() for name, value in sums.items()} | {
            name: v.amax() for name, v in maxima.items()
        }
    return loss, metrics


def _clipped(
    u_T: Tensor, advantages_T: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's pessimistic clip: (objective [T], where the clip holds, where the dual clip does)."""
    plain_T, clipped_T = -advantages_T * u_T, -advantages_T * _clip(u_T, config)
    objective_T = torch.maximum(plain_T, clipped_T)
    dual_T = torch.zeros_like(u_T, dtype=torch.bool)
    if config.loss.dual_clip is not None:
        # Bounds the loss of a token with negative advantage whose probability grew a lot; it then has no gradient.
        bound_T = config.loss.dual_clip * advantages_T.abs()
        dual_T = objective_T > bound_T
        objective_T = torch.minimum(objective_T, bound_T)
    return objective_T, clipped_T > plain_T, dual_T


def _cispo(
    u_T: Tensor, logprobs_T: Tensor, advantages_T: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """REINFORCE weighed by the clipped ratio: a clipped token keeps its gradient."""
    clipped_T = _clip(u_T, config).detach()
    return (
        -advantages_T * clipped_T * logprobs_T,
        clipped_T != u_T,
        torch.zeros_like(u_T, dtype=torch.bool),
    )


def _clip(u_T: Tensor, config: AlgorithmConfig) -> Tensor:
    return u_T.clamp(
        1 - config.loss.clip_eps, 1 + (config.loss.clip_eps_high or config.loss.clip_eps)
    )


def _reference_kl(logprobs_T: Tensor, reference_T: Tensor, config: AlgorithmConfig) -> Tensor:
    """Estimates KL(current | reference) on sampled tokens, both >= 0 (J. Schulman, "Approximating KL divergence", 2020)."""
    d_T = reference_T - logprobs_T
    return d_T.square() / 2 if config.kl.estimator == "k2" else d_T.exp() - d_T - 1
