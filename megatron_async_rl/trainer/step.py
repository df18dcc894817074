"""One training step: what the loss needs of the whole batch (values, reference and proximal logprobs), then an optimizer step
per minibatch.

What Megatron divides by: with calculate_per_token_loss the loss function returns (sum, count), gradients are summed
over micro-batches and data-parallel ranks undivided, and finalize_model_grads divides them once by the count summed over
both. So the gradient is that of sum / N with N global, however the batch is cut and laid out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import StepRefused
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.storage import batches
from megatron_async_rl.trainer import optimizer_step, pipeline, report
from megatron_async_rl.trainer.algorithms import critic as critics
from megatron_async_rl.trainer.algorithms.importance import kl_reward_to_go, second_moment_cutoff
from megatron_async_rl.trainer.algorithms.loss import MAXIMA, SUMS, LossInputs, policy_loss
from megatron_async_rl.trainer.algorithms.reference import reference_weights
from megatron_async_rl.trainer.data.microbatch import Microbatch, Packing, cut_minibatches, whole
from megatron_async_rl.trainer.model import layers
from megatron_async_rl.trainer.model.build import TrainerModel
from megatron_async_rl.trainer.model.logprobs import token_logprobs
from megatron_async_rl.trainer.report import PACKING_SUMS


def train_step(
    model: TrainerModel, samples: Sequence[TrainSample], version: int, config: Config
) -> dict[str, float]:
    """Trains on this data-parallel replica's samples; collective over all trainer ranks.

    Every rank of a replica passes the same samples. Returns the step's metrics, the same on every rank. Raises
    StepRefused, on all ranks, before an optimizer step that would write non-finite weights.
    """
    started = time.monotonic()
    minibatches = cut_minibatches(
        samples,
        config.algorithm.minibatches,
        version,
        packing(model, config),
        mpu.get_data_parallel_group(),
        config.run.seed,
    )
    minibatches = with_reference(model, minibatches, config)
    if model.critic:
        minibatches = critics.with_advantages(model.critic, minibatches, config)
    minibatches = with_trust(with_proximal(model, minibatches, config), config)
    trained_from = time.monotonic()
    try:
        steps = [_train_minibatch(model, minibatch, version, config) for minibatch in minibatches]
    except StepRefused as e:
        raise StepRefused(f"{e}. {_keep_batch(samples, version, config)}") from None
    learning_rate = model.optimizer.param_groups[0]["lr"]
    model.scheduler.step(increment=1)
    stats = report.summary([policy for policy, _ in steps])
    if model.critic:
        model.critic.scheduler.step(increment=1)
        stats |= critics.summary([critic for _, critic in steps])
    report.warn_of_mismatch(stats, version, config)
    return stats | {
        "train/lr": float(learning_rate),
        "train/loss_scale": float(model.optimizer.get_loss_scale()) if model.config.fp16 else 1.0,
        "perf/time/proximal_s": trained_from - started,
        "perf/time/train_s": time.monotonic() - trained_from,
    }


def _train_minibatch(
    model: TrainerModel, minibatch: list[Microbatch], version: int, config: Config
) -> tuple[dict[str, float], dict[str, float]]:
    """One optimizer step of the policy, and of the critic where there is one; metrics of both."""
    totals = accumulate_gradients(model, minibatch, config)
    values: dict[str, float] = {}
    if model.critic:
        values = critics.accumulate_gradients(model.critic, minibatch, config)
        value_norm = optimizer_step.checked_norm(
            model.critic, values["value_loss"], values, version, "lower critic.lr"
        )
    norm, overflowed = 0.0, False
    stopped = _ratio_too_large(totals, config)
    if not stopped:
        norm, overflowed = apply_gradients(model, totals, version)
    totals |= {"grad_norm": norm, "overflowed": float(overflowed), "stopped": float(stopped)}
    if model.critic:
        norm, overflowed = optimizer_step.step(model.critic, value_norm, version)
        values |= {"grad_norm": norm, "overflowed": float(overflowed)}
    return totals, values


def packing(model: TrainerModel, config: Config) -> Packing:
    te = layers.has_transformer_engine()
    return Packing(
        budget=config.trainer.max_tokens_per_microbatch,
        tp=mpu.get_tensor_model_parallel_world_size(),
        device=model.device,
        thd=te,
        dense=not te and (model.device.type == "cpu" or model.config.params_dtype == torch.float32),
        cp=mpu.get_context_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        divisor=model.config.microbatch_group_size_per_vp_stage if len(model.chunks) > 1 else 1,
        even=config.trainer.packing == "karmarkar_karp",
        attention_length=_attention_length(model),
    )


def _attention_length(model: TrainerModel) -> float:
    """Tokens of a sequence whose causal attention costs as much as its matrix products."""
    s = model.shape
    layer = s.hidden_size * s.kv_channels * 2 * (s.num_attention_heads + s.num_query_groups)
    layer += 3 * s.hidden_size * s.ffn_hidden_size
    weights = s.num_layers * layer + s.hidden_size * s.vocab_size
    return weights / (s.num_layers * s.num_attention_heads * s.kv_channels)


def with_proximal(
    model: TrainerModel, minibatches: list[list[Microbatch]], config: Config
) -> list[list[Microbatch]]:
    """The same, with the logprobs of the weights as they are where the loss needs them given.

    With one minibatch, and with reuse_first_minibatch for the first of several, the proximal policy is the current one:
    no step lies between them, and the loss takes it from its own forward pass.
    """
    algorithm = config.algorithm
    if algorithm.loss.objective == "ppo" or algorithm.staleness_correction.proximal == "loglinear":
        moved = [
            [replace(microbatch, moved=True) for microbatch in minibatch]
            for minibatch in minibatches[1:]
        ]
        return minibatches[:1] + moved
    if len(minibatches) == 1 and algorithm.staleness_correction.m2_threshold is None:
        return minibatches
    given = 1 if algorithm.staleness_correction.proximal == "reuse_first_minibatch" else 0
    rest = minibatches[given:]
    logprobs = _current_logprobs(model, rest, config)
    return minibatches[:given] + [
        [
            replace(microbatch, proximal_T=logprobs.pop(0)) if logprobs else microbatch
            for microbatch in minibatch
        ]
        for minibatch in rest
    ]


def with_trust(minibatches: list[list[Microbatch]], config: Config) -> list[list[Microbatch]]:
    """With m2_threshold: the same, with the tokens of the batch that are trusted, by the proximal logprobs they have."""
    threshold = config.algorithm.staleness_correction.m2_threshold
    if threshold is None or not mpu.is_pipeline_last_stage():
        return minibatches

    def squares_T(microbatch: Microbatch) -> Tensor:
        assert microbatch.proximal_T is not None
        return (microbatch.proximal_T - microbatch.behavior_T).square()

    def total(sums: Tensor) -> Tensor:
        dist.all_reduce(sums, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return sums

    flat = [microbatch for minibatch in minibatches for microbatch in minibatch]
    cutoff = second_moment_cutoff(
        torch.cat([squares_T(m)[m.mask_T] for m in flat]), threshold, total
    )
    return [
        [replace(m, trusted_T=squares_T(m) <= cutoff) for m in minibatch]
        for minibatch in minibatches
    ]


def with_reference(
    model: TrainerModel, minibatches: list[list[Microbatch]], config: Config
) -> list[list[Microbatch]]:
    """With kl_coef: the same, with the starting policy's logprobs; with kl_in = reward, taken from the advantages."""
    algorithm = config.algorithm
    if not algorithm.kl.coef:
        return minibatches
    with reference_weights(model, config):
        logprobs = _current_logprobs(model, minibatches, config)

    def filled(microbatch: Microbatch) -> Microbatch:
        if not logprobs:
            return microbatch
        microbatch = replace(microbatch, reference_T=logprobs.pop(0))
        if (
            algorithm.kl.apply_to == "loss" or model.critic
        ):  # a critic's advantages are made of it later
            return microbatch
        pack = whole(microbatch)
        assert pack.reference_T is not None
        kl_T = microbatch.sequences.own(
            kl_reward_to_go(pack.behavior_T, pack.reference_T, pack.mask_T, pack.owners)
        )
        return replace(microbatch, advantages_T=microbatch.advantages_T - algorithm.kl.coef * kl_T)

    return [[filled(microbatch) for microbatch in minibatch] for minibatch in minibatches]


def _current_logprobs(
    model: TrainerModel, minibatches: list[list[Microbatch]], config: Config
) -> list[Tensor]:
    """Of every micro-batch in order, under the weights as they are; empty but on the last pipeline stage."""
    flat = [microbatch for minibatch in minibatches for microbatch in minibatch]
    return pipeline.evaluate(model, flat, partial(_proximal_step, model, config))


def _keep_batch(samples: Sequence[TrainSample], version: int, config: Config) -> str:
    """Saves a refused batch, each replica its share; says how to train it again."""
    folder = config.run_dir / "refused"
    if mpu.get_model_parallel_group().rank() == 0 and mpu.get_context_parallel_rank() == 0:
        batches.save(
            folder / f"v{version}-replica{mpu.get_data_parallel_rank()}.npz", version, list(samples)
        )
    return f"The batch is kept; to train it again: python -m megatron_async_rl replay {folder}/v{version}-replica*.npz"


def _ratio_too_large(totals: dict[str, float], config: Config) -> bool:
    """Whether the minibatch is so far from the proximal policy that it shall make no step (AReaL's early stop)."""
    limit = config.algorithm.loss.stop_ratio
    return limit is not None and totals["importance_weight"] / max(totals["tokens"], 1) > limit


def accumulate_gradients(
    model: TrainerModel, minibatch: list[Microbatch], config: Config
) -> dict[str, float]:
    """Forward and backward over a minibatch: leaves its gradient in the buffers and returns its metrics, global."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    parts = pipeline.run(model, minibatch, partial(_loss_step, model, config), forward_only=False)
    sums = torch.zeros(len(SUMS) + len(PACKING_SUMS), dtype=torch.float64)
    maxima = torch.zeros(len(MAXIMA) + 1, dtype=torch.float64)
    if mpu.get_tensor_model_parallel_rank() == 0:  # the others compute the same: count it once
        if parts:
            sums[: len(SUMS)] = torch.stack([part[0] for part in parts]).sum(0).cpu()
            maxima[: len(MAXIMA)] = torch.stack([part[1] for part in parts]).amax(0).cpu()
        if mpu.is_pipeline_first_stage() and mpu.get_context_parallel_rank() == 0:
            budget, costs = (
                config.trainer.max_tokens_per_microbatch,
                [microbatch.cost for microbatch in minibatch],
            )
            tokens = sum(microbatch.num_tokens for microbatch in minibatch)
            least = max(1, math.ceil(tokens / budget))
            sums[len(SUMS) :] = torch.tensor(
                [tokens, len(costs) * budget, least * budget, sum(costs), len(costs)],
                dtype=torch.float64,
            )
            maxima[-1] = max(costs)
    sums, maxima = sums.to(model.device), maxima.to(model.device)
    dist.all_reduce(sums)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return dict(
        zip(
            (*SUMS, *PACKING_SUMS, *MAXIMA, "cost_max"),
            sums.tolist() + maxima.tolist(),
            strict=True,
        )
    )


def apply_gradients(
    model: TrainerModel, totals: dict[str, float], version: int
) -> tuple[float, bool]:
    """One optimizer step: (the gradient's norm before clipping, whether fp16 overflowed and it was skipped).

    All ranks take it, skip it, or refuse it.
    """
    remedy = (
        f"largest importance weight {totals['importance_weight_max']:.4g}, behavior weight "
        f"{totals['behavior_weight_max']:.4g}: if these are large lower megatron.lr or algorithm.staleness_correction.behavior_weight_cap"
    )
    norm = optimizer_step.checked_norm(model, totals["loss"], totals, version, remedy)
    return optimizer_step.step(model, norm, version)


def _logprobs(
    model: TrainerModel, config: Config, microbatch: Microbatch, logits: Tensor, entropy: bool
) -> tuple[Tensor, Tensor]:
    return token_logprobs(
        logits[0],
        microbatch.targets_T,
        vocab_size=model.shape.vocab_size,
        temperature=config.rollout.temperature,
        group=mpu.get_tensor_model_parallel_group(),
        entropy=entropy,
        overwrite_logits=True,
    )


def _proximal_step(
    model: TrainerModel, config: Config, data: Iterator[Microbatch], chunk: torch.nn.Module
) -> tuple[Tensor, Any]:
    microbatch = next(data)

    def collect(logits: Tensor, non_loss_data: bool) -> Tensor:
        return _logprobs(model, config, microbatch, logits, entropy=False)[0]

    return pipeline.forward(model, chunk, microbatch), collect


def _loss_step(
    model: TrainerModel, config: Config, data: Iterator[Microbatch], chunk: torch.nn.Module
) -> tuple[Tensor, Any]:
    microbatch = next(data)

    def loss_of(logits: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        logprobs_T, entropy_T = _logprobs(model, config, microbatch, logits, entropy=True)
        inputs = LossInputs(
            logprobs_T=logprobs_T,
            entropy_T=entropy_T,
            proximal_T=microbatch.proximal_T,
            behavior_T=microbatch.behavior_T,
            advantages_T=microbatch.advantages_T,
            mask_T=microbatch.mask_T,
            lag_T=microbatch.lag_T,
            owners=microbatch.owners,
            reference_T=microbatch.reference_T,
            trusted_T=microbatch.trusted_T,
            moved=microbatch.moved,
        )
        loss, metrics = policy_loss(inputs, config.algorithm)
        count = microbatch.mask_T.sum(dtype=torch.int32)
        sums = torch.stack([metrics[name].double() for name in SUMS])
        return loss, count, (sums, torch.stack([metrics[name].double() for name in MAXIMA]))

    return pipeline.forward(model, chunk, microbatch), loss_of
