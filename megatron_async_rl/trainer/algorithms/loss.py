"""The loss of one packed micro-batch: the policy objective, summed over tokens, and other terms.

With m the loss mask, A the advantage, and the token's logprobs under three policies (behavior: the
one that sampled it; proximal: the weights at the start of this training step; current):

    u = exp(current - proximal)               the ratio that is clipped
    w = exp(proximal - behavior), detached    corrects for staleness (importance.behavior_weights)
    L = sum m * w * objective(u, A) / N

    decoupled_ppo   max(-A u, -A clip(u, 1 - eps, 1 + eps_high))          arXiv 2505.24298, eq. 5
    gspo            the same with u = exp(mean over the sample of current - proximal) and A the
                    sample's mean                                         arXiv 2507.18071
    cispo           -A detach(clip(u, 1 - eps, 1 + eps_high)) current     arXiv 2506.13585
    ppo             decoupled_ppo with u against the behavior policy and w = 1

Dual clip (arXiv 1912.09729) bounds all but cispo by c |A|. Objectives are in objectives.py; a
user's takes the place of objective(u, A). L also gets -entropy_coef * entropy and, with
kl.apply_to = loss, kl.coef * KL(current | reference).

N is the global number of loss tokens of the minibatch, counted before the cap removes any.
Megatron's finalize_model_grads divides by it, so the result depends neither on the split into
micro-batches nor on the parallel layout.

Suffix T: tokens of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.trainer.algorithms import objectives
from megatron_async_rl.trainer.algorithms.importance import behavior_weights, loglinear_proximal
from megatron_async_rl.trainer.algorithms.objectives import ObjectiveInputs
from megatron_async_rl.trainer.data.sample_index import SampleIndex


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Tensors [T] aligned with the position that predicts the token.

    Values where the mask is False have no effect.
    """

    logprobs_T: Tensor  # current policy; the gradient flows through it
    entropy_T: Tensor  # current policy
    proximal_T: Tensor | None
    """None: equal to the current policy's (no step in between), loglinear, or not needed."""
    behavior_T: Tensor
    advantages_T: Tensor
    mask_T: Tensor  # bool
    staleness_T: Tensor  # versions from the one that sampled the token to the one in training
    sample_index: SampleIndex | None = None  # for the sequence level and some objectives
    reference_T: Tensor | None = None  # with kl.coef
    m2_mask_T: Tensor | None = None  # bool, with m2_threshold: False is masked like beyond the cap
    proximal_missing: bool = False
    """Logprobs of this step's first weights are unknown, so the engine's cannot be compared."""


SUMS = tuple(
    "loss tokens entropy approx_kl behavior_approx_kl reference_kl importance_weight "
    "behavior_weight clipped dual_clipped masked_by_cap current_tokens compared_tokens "
    "logprob_diff mismatch_kl mismatch_beyond_cap".split()
)
MAXIMA = ("importance_weight_max", "behavior_weight_max", "logprob_diff_max")
USER = "user/"  # before the names of metrics that a user's objective returns


def sum_names(config: AlgorithmConfig) -> tuple[str, ...]:
    """Returns SUMS and the metrics of the configured objective, the same on every rank."""
    return (*SUMS, *(USER + name for name in objectives.load(config).metrics or ()))


def policy_loss(inputs: LossInputs, config: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss summed over the masked tokens, `sum_names` and MAXIMA over the masked tokens).

    approx_kl and behavior_approx_kl sum log ratios, old - new on tokens sampled by the old policy:
    they can be negative. Raises HookFailed if a user's objective fails.
    """
    objective = objectives.load(config)
    # Values outside the mask become 0 before any exp: inf and nan in padding then reach neither the
    # loss nor, through 0 * inf, the gradient.
    mask_T = inputs.mask_T
    logprobs_T = torch.where(mask_T, inputs.logprobs_T, 0.0)
    behavior_T = torch.where(mask_T, inputs.behavior_T, 0.0)
    advantages_T = torch.where(mask_T, inputs.advantages_T, 0.0)
    staleness_T = torch.where(mask_T, inputs.staleness_T, 0)
    if inputs.proximal_T is not None:
        trainer_T = proximal_T = torch.where(mask_T, inputs.proximal_T, 0.0)
    else:
        trainer_T = proximal_T = logprobs_T.detach()
        if config.staleness_correction.proximal == "loglinear" and objective.decoupled:
            proximal_T = loglinear_proximal(logprobs_T, behavior_T, staleness_T)
    if objective.decoupled:
        old_T = proximal_T
        w_T, keep_T = behavior_weights(proximal_T, behavior_T, mask_T, inputs.sample_index, config)
    else:
        old_T, w_T, keep_T = behavior_T, torch.ones_like(behavior_T), mask_T
    if inputs.m2_mask_T is not None:
        keep_T = keep_T & inputs.m2_mask_T
    view = ObjectiveInputs(
        logprobs_T=logprobs_T,
        old_T=old_T,
        behavior_T=behavior_T,
        advantages_T=advantages_T,
        mask_T=mask_T,
        staleness_T=staleness_T,
        sample_index=inputs.sample_index,
    )
    objective_T, own = objective(view, config.loss)
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
        current_T = mask_T & (inputs.staleness_T == 0)
        compared_T = torch.zeros_like(mask_T) if inputs.proximal_missing else current_T
        log_w_T = torch.where(compared_T, trainer_T - behavior_T, 0.0)
        none_T = beyond_T = torch.zeros_like(mask_T)
        u_T = own["importance_weight"] if "importance_weight" in own else (logprobs_T - old_T).exp()
        cap = config.staleness_correction.behavior_weight_cap
        if cap is not None:
            beyond_T = compared_T & (log_w_T.exp() > cap)
        sums = {
            "loss": loss,
            "tokens": mask_T,
            "entropy": torch.where(mask_T, inputs.entropy_T, 0.0),
            "approx_kl": old_T - logprobs_T,
            "behavior_approx_kl": behavior_T - proximal_T,
            "reference_kl": reference_kl,
            "importance_weight": torch.where(mask_T, u_T, 0.0),
            "behavior_weight": torch.where(mask_T, w_T, 0.0),
            "clipped": keep_T & own.get("clipped", none_T),
            "dual_clipped": keep_T & own.get("dual_clipped", none_T),
            "masked_by_cap": mask_T & ~keep_T,
            "current_tokens": current_T,
            "compared_tokens": compared_T,
            "logprob_diff": log_w_T.abs(),
            "mismatch_kl": log_w_T.exp() - log_w_T - 1,  # of the engine from the trainer
            "mismatch_beyond_cap": beyond_T,
        }
        maxima = {
            "importance_weight_max": torch.where(mask_T, u_T, 0.0),
            "behavior_weight_max": torch.where(mask_T, w_T, 0.0),
            "logprob_diff_max": log_w_T.abs(),
        }
        for name in objective.metrics or ():
            sums[USER + name] = torch.where(mask_T, own[name], 0)
        metrics = {name: value.sum() for name, value in sums.items()} | {
            name: v.amax() for name, v in maxima.items()
        }
    return loss, metrics


def _reference_kl(logprobs_T: Tensor, reference_T: Tensor, config: AlgorithmConfig) -> Tensor:
    """Returns the k2 or k3 estimate of KL(current | reference) [T], >= 0.

    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    d_T = reference_T - logprobs_T
    return d_T.square() / 2 if config.kl.estimator == "k2" else d_T.exp() - d_T - 1
