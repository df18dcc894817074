"""One training step: forward passes over the whole batch, then one optimizer step per minibatch.

Normalization: with calculate_per_token_loss the loss function returns (sum, count). Megatron adds
up gradients over micro-batches and data-parallel ranks, and finalize_model_grads divides them once
by the sum of the counts. So the gradient is that of sum / N with the global N, however the batch is
split and laid out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import NonFiniteStep
from megatron_async_rl.program import command
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.storage import batches
from megatron_async_rl.trainer import optimizer_step, passes, pipeline, report
from megatron_async_rl.trainer.algorithms import critic as critics
from megatron_async_rl.trainer.algorithms.loss import MAXIMA, LossInputs, policy_loss, sum_names
from megatron_async_rl.trainer.data.microbatch import Microbatch, Packing, make_minibatches
from megatron_async_rl.trainer.model.build import TrainerModel
from megatron_async_rl.trainer.probe import Probe

Metrics = dict[str, float]


def train_step(
    model: TrainerModel,
    samples: Sequence[TrainSample],
    version: int,
    config: Config,
    probe: Probe | None = None,
) -> Metrics:
    """Trains on this data-parallel replica's samples; collective over all trainer ranks.

    Every rank of a replica passes the same samples. `probe` collects the logprobs of the samples
    that are part of one. Returns the step's metrics, the same on every
    rank. Raises NonFiniteStep, on all ranks, before an optimizer step that would write non-finite
    weights.
    """
    started = time.monotonic()
    report.begin_peak_memory(model.device)
    minibatches = make_minibatches(samples, version, Packing.of(model, config), config)
    minibatches = passes.add_reference_logprobs(model, minibatches, config)
    if model.critic:
        minibatches = critics.add_advantages(model.critic, minibatches, config)
    minibatches = passes.add_proximal_logprobs(model, minibatches, config)
    minibatches = passes.add_m2_mask(minibatches, config)
    passes_ended = time.monotonic()
    try:
        steps = [
            train_minibatch(model, minibatch, version, config, probe) for minibatch in minibatches
        ]
    except NonFiniteStep as e:
        raise NonFiniteStep(f"{e}. {_save_refused_batch(samples, version, config)}") from None
    train_s = time.monotonic() - passes_ended
    learning_rate = model.optimizer.param_groups[0]["lr"]
    model.scheduler.step(increment=1)
    metrics = report.summary([policy for policy, _ in steps])
    if model.critic:
        model.critic.scheduler.step(increment=1)
        metrics |= critics.summary([critic for _, critic in steps])
    cost = sum(policy["cost"] for policy, _ in steps)
    metrics |= report.utilization(model, cost, train_s, config) | report.peak_memory(model.device)
    return metrics | {
        "train/lr": float(learning_rate),
        "train/loss_scale": float(model.optimizer.get_loss_scale()) if model.config.fp16 else 1.0,
        "perf/time/proximal_s": passes_ended - started,
        "perf/time/train_s": train_s,
    }


def train_minibatch(
    model: TrainerModel,
    minibatch: list[Microbatch],
    version: int,
    config: Config,
    probe: Probe | None = None,
) -> tuple[Metrics, Metrics]:
    """Makes one optimizer step of the policy, and of the critic if there is one.

    Returns the sums and maxima of both over the minibatch. All gradients are computed and checked
    before any weight is written.
    """
    totals = accumulate_gradients(model, minibatch, config, probe)
    values: Metrics = {}
    if model.critic:
        values = critics.accumulate_gradients(model.critic, minibatch, config)
        value_norm = optimizer_step.checked_norm(
            model.critic, values["value_loss"], values, version, "lower critic.lr"
        )
    norm, overflowed = 0.0, False
    stopped = _exceeds_stop_ratio(totals, config)
    if not stopped:
        norm, overflowed = _apply_gradients(model, totals, version)
    totals |= {"grad_norm": norm, "overflowed": float(overflowed), "stopped": float(stopped)}
    if model.critic:
        norm, overflowed = optimizer_step.step(model.critic, value_norm, version)
        values |= {"grad_norm": norm, "overflowed": float(overflowed)}
    return totals, values


def accumulate_gradients(
    model: TrainerModel, minibatch: list[Microbatch], config: Config, probe: Probe | None = None
) -> Metrics:
    """Runs forward and backward over a minibatch; returns the global sums and maxima of the loss.

    The gradient is left in the buffers. Collective.
    """
    forward_step = partial(_loss_step, model, config, probe)
    parts = pipeline.accumulate_gradients(model, minibatch, forward_step)
    loss_sums = sum_names(config.algorithm)
    sums = torch.zeros(len(loss_sums) + len(report.PACKING_SUMS), dtype=torch.float64)
    maxima = torch.zeros(len(MAXIMA) + 1, dtype=torch.float64)
    if mpu.get_tensor_model_parallel_rank() == 0:  # the other ranks compute the same: count it once
        if parts:
            sums[: len(loss_sums)] = torch.stack([part[0] for part in parts]).sum(0).cpu()
            maxima[: len(MAXIMA)] = torch.stack([part[1] for part in parts]).amax(0).cpu()
        if mpu.is_pipeline_first_stage() and mpu.get_context_parallel_rank() == 0:
            packing_sums = report.packing_sums(minibatch, config.trainer.max_tokens_per_microbatch)
            sums[len(loss_sums) :] = torch.tensor(packing_sums, dtype=torch.float64)
            maxima[-1] = max(microbatch.cost for microbatch in minibatch)
    sums, maxima = sums.to(model.device), maxima.to(model.device)
    dist.all_reduce(sums)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    names = (*loss_sums, *report.PACKING_SUMS, *MAXIMA, "cost_max")
    return dict(zip(names, sums.tolist() + maxima.tolist(), strict=True))


def _apply_gradients(model: TrainerModel, totals: Metrics, version: int) -> tuple[float, bool]:
    """Makes the policy's optimizer step; see optimizer_step.step. Raises NonFiniteStep."""
    remedy = (
        f"largest importance weight {totals['importance_weight_max']:.4g}, behavior weight "
        f"{totals['behavior_weight_max']:.4g}: if these are large, lower megatron.lr or "
        "algorithm.staleness_correction.behavior_weight_cap"
    )
    norm = optimizer_step.checked_norm(model, totals["loss"], totals, version, remedy)
    return optimizer_step.step(model, norm, version)


def _exceeds_stop_ratio(totals: Metrics, config: Config) -> bool:
    """Returns whether the mean ratio to the proximal policy forbids a step (AReaL's early stop)."""
    limit = config.algorithm.loss.stop_ratio
    return limit is not None and totals["importance_weight"] / max(totals["tokens"], 1) > limit


def _save_refused_batch(samples: Sequence[TrainSample], version: int, config: Config) -> str:
    """Saves the batch, each replica its share; returns how to train it again. Collective."""
    folder = config.run_dir / "refused"
    if mpu.get_model_parallel_group().rank() == 0 and mpu.get_context_parallel_rank() == 0:
        name = f"v{version}-replica{mpu.get_data_parallel_rank()}.npz"
        batches.save(folder / name, version, list(samples))
    dist.barrier()  # the first rank that fails ends the others
    files = f"v{version}-replica*.npz"
    return f"The batch is saved; to train it again: {command('replay', folder)}/{files}"


def _loss_step(
    model: TrainerModel,
    config: Config,
    probe: Probe | None,
    data: Iterator[Microbatch],
    chunk: torch.nn.Module,
) -> tuple[Tensor, Any]:
    microbatch = next(data)

    def loss_of(logits: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        logprobs_T, entropy_T = passes.policy_logprobs(
            model, config, microbatch, logits, entropy=True
        )
        if probe:
            probe.add(microbatch, logprobs_T)
        inputs = LossInputs(
            logprobs_T=logprobs_T,
            entropy_T=entropy_T,
            proximal_T=microbatch.proximal_T,
            behavior_T=microbatch.behavior_T,
            advantages_T=microbatch.advantages_T,
            mask_T=microbatch.mask_T,
            staleness_T=microbatch.staleness_T,
            sample_index=microbatch.sample_index,
            reference_T=microbatch.reference_T,
            m2_mask_T=microbatch.m2_mask_T,
            proximal_missing=microbatch.proximal_missing,
        )
        loss, metrics = policy_loss(inputs, config.algorithm)
        count = microbatch.mask_T.sum(dtype=torch.int32)
        sums = torch.stack([metrics[name].double() for name in sum_names(config.algorithm)])
        return loss, count, (sums, torch.stack([metrics[name].double() for name in MAXIMA]))

    return pipeline.forward(model, chunk, microbatch), loss_of
