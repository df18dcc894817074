"""One training step: proximal logprobs of the whole batch, then one optimizer step per minibatch.

What Megatron divides by: with calculate_per_token_loss the loss function returns (sum, count), gradients are summed
over micro-batches and data-parallel ranks undivided, and finalize_model_grads divides them once by the count summed over
both. So the gradient is that of sum / N with N global, however the batch is cut and laid out.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_async_rl import batches
from megatron_async_rl.config import Config
from megatron_async_rl.errors import StepRefused
from megatron_async_rl.trainer import layers
from megatron_async_rl.trainer.data import Microbatch, Packing, cut_minibatches
from megatron_async_rl.trainer.importance import kl_reward_to_go
from megatron_async_rl.trainer.logprobs import token_logprobs
from megatron_async_rl.trainer.loss import MAXIMA, SUMS, LossInputs, policy_loss
from megatron_async_rl.trainer.model import TrainerModel
from megatron_async_rl.trainer.reference import reference_weights
from megatron_async_rl.types import TrainSample

logger = logging.getLogger(__name__)


def train_step(model: TrainerModel, samples: Sequence[TrainSample], version: int, config: Config) -> dict[str, float]:
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
    minibatches = with_proximal(model, minibatches, config)
    trained_from = time.monotonic()
    steps = []
    for minibatch in minibatches:
        totals = accumulate_gradients(model, minibatch, config)
        stopped = _ratio_too_large(totals, config)
        norm = 0.0
        if not stopped:
            try:
                norm = apply_gradients(model, totals, version)
            except StepRefused as e:
                raise StepRefused(f"{e}. {_keep_batch(samples, version, config)}") from None
        steps.append(totals | {"grad_norm": norm, "stopped": float(stopped)})
    learning_rate = model.optimizer.param_groups[0]["lr"]
    model.scheduler.step(increment=1)
    stats = _summary(steps)
    _warn_of_mismatch(stats, version, config)
    return stats | {
        "train/lr": float(learning_rate),
        "perf/time/proximal_s": trained_from - started,
        "perf/time/train_s": time.monotonic() - trained_from,
    }


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
        divisor=mpu.get_pipeline_model_parallel_world_size()
        if config.parallel_size("virtual_pipeline_model") > 1
        else 1,
        attention_length=_attention_length(model) if config.trainer.packing == "karmarkar_karp" else None,
    )


def _attention_length(model: TrainerModel) -> float:
    """Tokens of a sequence whose causal attention costs as much as its matrix products."""
    s = model.shape
    layer = s.hidden_size * s.kv_channels * 2 * (s.num_attention_heads + s.num_query_groups)
    layer += 3 * s.hidden_size * s.ffn_hidden_size
    weights = s.num_layers * layer + s.hidden_size * s.vocab_size
    return weights / (s.num_layers * s.num_attention_heads * s.kv_channels)


def with_proximal(model: TrainerModel, minibatches: list[list[Microbatch]], config: Config) -> list[list[Microbatch]]:
    """The same, with the logprobs of the weights as they are where the loss needs them given.

    With one minibatch, and with reuse_first_minibatch for the first of several, the proximal policy is the current one:
    no step lies between them, and the loss takes it from its own forward pass.
    """
    if config.algorithm.loss == "ppo" or config.algorithm.proximal == "loglinear" or len(minibatches) == 1:
        return minibatches
    given = 1 if config.algorithm.proximal == "reuse_first_minibatch" else 0
    rest = minibatches[given:]
    logprobs = _current_logprobs(model, rest, config)
    return minibatches[:given] + [
        [replace(microbatch, proximal_T=logprobs.pop(0)) if logprobs else microbatch for microbatch in minibatch]
        for minibatch in rest
    ]


def with_reference(model: TrainerModel, minibatches: list[list[Microbatch]], config: Config) -> list[list[Microbatch]]:
    """With kl_coef: the same, with the starting policy's logprobs; with kl_in = reward, taken from the advantages."""
    algorithm = config.algorithm
    if not algorithm.kl_coef:
        return minibatches
    with reference_weights(model, config):
        logprobs = _current_logprobs(model, minibatches, config)

    def filled(microbatch: Microbatch) -> Microbatch:
        if not logprobs:
            return microbatch
        microbatch = replace(microbatch, reference_T=logprobs.pop(0))
        if algorithm.kl_in == "loss":
            return microbatch
        assert microbatch.owners is not None and microbatch.reference_T is not None
        kl_T = kl_reward_to_go(microbatch.behavior_T, microbatch.reference_T, microbatch.mask_T, microbatch.owners)
        return replace(microbatch, advantages_T=microbatch.advantages_T - algorithm.kl_coef * kl_T)

    return [[filled(microbatch) for microbatch in minibatch] for minibatch in minibatches]


def _current_logprobs(model: TrainerModel, minibatches: list[list[Microbatch]], config: Config) -> list[Tensor]:
    """Of every micro-batch in order, under the weights as they are; empty but on the last pipeline stage."""
    flat = [microbatch for minibatch in minibatches for microbatch in minibatch]
    model.chunk.eval()
    with torch.no_grad():
        logprobs = _run(model, flat, partial(_proximal_step, model, config), forward_only=True, collect=True)
    model.chunk.train()
    return logprobs


def _keep_batch(samples: Sequence[TrainSample], version: int, config: Config) -> str:
    """Saves a refused batch, each replica its share; says how to train it again."""
    folder = config.run_dir / "refused"
    if mpu.get_model_parallel_group().rank() == 0 and mpu.get_context_parallel_rank() == 0:
        batches.save(folder / f"v{version}-replica{mpu.get_data_parallel_rank()}.npz", version, list(samples))
    return f"The batch is kept; to train it again: python -m megatron_async_rl replay {folder}/v{version}-replica*.npz"


def _ratio_too_large(totals: dict[str, float], config: Config) -> bool:
    """Whether the minibatch is so far from the proximal policy that it shall make no step (AReaL's early stop)."""
    limit = config.algorithm.stop_ratio
    return limit is not None and totals["importance_weight"] / max(totals["tokens"], 1) > limit


def _warn_of_mismatch(stats: dict[str, float], version: int, config: Config) -> None:
    limit = config.algorithm.mismatch_alarm
    if limit is not None and stats["train/logprob_diff_mean"] > limit and dist.get_rank() == 0:
        logger.warning(
            "training step %d: engine and trainer differ by %.4g a token (mean abs logprob under the same version), more "
            "than algorithm.mismatch_alarm = %g; largest %.4g, beyond the cap %.2g of the tokens",
            version,
            stats["train/logprob_diff_mean"],
            limit,
            stats["train/logprob_diff_max"],
            stats["train/mismatch_beyond_cap_fraction"],
        )


def accumulate_gradients(model: TrainerModel, minibatch: list[Microbatch], config: Config) -> dict[str, float]:
    """Forward and backward over a minibatch: leaves its gradient in the buffers and returns its metrics, global."""
    model.chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    parts = _run(model, minibatch, partial(_loss_step, model, config), forward_only=False)
    sums = torch.zeros(len(SUMS) + 2, dtype=torch.float64)
    maxima = torch.zeros(len(MAXIMA), dtype=torch.float64)
    if mpu.get_tensor_model_parallel_rank() == 0:  # the others compute the same: count it once
        if parts:
            sums[: len(SUMS)] = torch.stack([part[0] for part in parts]).sum(0).cpu()
            maxima = torch.stack([part[1] for part in parts]).amax(0).cpu()
        if mpu.is_pipeline_first_stage() and mpu.get_context_parallel_rank() == 0:
            sums[-2] = sum(microbatch.num_tokens for microbatch in minibatch)
            sums[-1] = len(minibatch) * config.trainer.max_tokens_per_microbatch
    sums, maxima = sums.to(model.device), maxima.to(model.device)
    dist.all_reduce(sums)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return dict(zip((*SUMS, "packed", "budget", *MAXIMA), sums.tolist() + maxima.tolist(), strict=True))


def apply_gradients(model: TrainerModel, totals: dict[str, float], version: int) -> float:
    """One optimizer step; returns the gradient's norm before clipping. All ranks refuse it, or none."""
    # Both numbers are global, so all ranks decide alike. The optimizer would write before it could be asked.
    model.optimizer.prepare_grads()
    norm = float(model.optimizer.get_grad_norm())
    loss = totals["loss"]
    if not math.isfinite(norm) or not math.isfinite(loss):
        raise StepRefused(
            f"training step {version}: loss {loss / max(totals['tokens'], 1):.6g}, gradient norm {norm:.6g}; weights are as "
            f"before. Largest importance weight {totals['importance_weight_max']:.4g}, behavior weight "
            f"{totals['behavior_weight_max']:.4g}: if these are large lower megatron.lr or algorithm.behavior_weight_cap"
        )
    updated, _, _ = model.optimizer.step()
    if not updated:
        raise StepRefused(f"training step {version}: the optimizer found non-finite gradients; weights are as before")
    return norm


def _run(
    model: TrainerModel, microbatches: list[Microbatch], step: Any, *, forward_only: bool, collect: bool = False
) -> list:
    """Drives micro-batches through the pipeline; returns what the last stage collected, elsewhere nothing."""
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(microbatches),
        model=model.chunk,
        num_microbatches=len(microbatches),
        seq_length=1,  # with variable_seq_lengths shapes travel with the tensors
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


def _forward(model: TrainerModel, chunk: torch.nn.Module, microbatch: Microbatch) -> Tensor:
    """Logits [1, T, V] of this rank's part of the vocabulary, in the model's precision; hidden states before the last stage."""
    options = {"fp32_output": False} if model.config.bf16 else {}
    return chunk(
        microbatch.ids_T[None],
        microbatch.sequences.positions_T[None],
        None,
        packed_seq_params=microbatch.sequences,
        **options,
    )


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

    return _forward(model, chunk, microbatch), collect


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
        )
        loss, metrics = policy_loss(inputs, config.algorithm)
        count = microbatch.mask_T.sum(dtype=torch.int32)
        sums = torch.stack([metrics[name].double() for name in SUMS])
        return loss, count, (sums, torch.stack([metrics[name].double() for name in MAXIMA]))

    return _forward(model, chunk, microbatch), loss_of


def _summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """The step's metrics: sums over its minibatches divided by counts, maxima, and the mean gradient norm."""
    total = {name: sum(step[name] for step in steps) for name in (*SUMS, "packed", "budget")}
    largest = {name: max(step[name] for step in steps) for name in MAXIMA}
    tokens = max(total["tokens"], 1)
    return {
        "train/loss": total["loss"] / tokens,
        "train/grad_norm": sum(step["grad_norm"] for step in steps) / len(steps),
        "train/entropy": total["entropy"] / tokens,
        "train/approx_kl": total["approx_kl"] / tokens,
        "train/behavior_approx_kl": total["behavior_approx_kl"] / tokens,
        "train/importance_weight_mean": total["importance_weight"] / tokens,
        "train/importance_weight_max": largest["importance_weight_max"],
        "train/behavior_weight_mean": total["behavior_weight"] / tokens,
        "train/behavior_weight_max": largest["behavior_weight_max"],
        "train/clip_fraction": total["clipped"] / tokens,
        "train/dual_clip_fraction": total["dual_clipped"] / tokens,
        "train/masked_by_cap_fraction": total["masked_by_cap"] / tokens,
        "train/logprob_diff_mean": total["logprob_diff"] / max(total["current_tokens"], 1),
        "train/logprob_diff_max": largest["logprob_diff_max"],
        "train/mismatch_kl": total["mismatch_kl"] / max(total["current_tokens"], 1),
        "train/mismatch_beyond_cap_fraction": total["mismatch_beyond_cap"] / max(total["current_tokens"], 1),
        "train/reference_kl": total["reference_kl"] / tokens,
        "train/stopped_minibatches": sum(step["stopped"] for step in steps),
        "train/current_version_fraction": total["current_tokens"] / tokens,
        "train/tokens": total["tokens"],
        "train/packed_tokens": total["packed"],
        "train/packing_efficiency": total["packed"] / max(total["budget"], 1),
    }
