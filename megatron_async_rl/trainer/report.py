"""Metrics of a training step: from sums and maxima over its minibatches, and of the GPUs."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_async_rl.config.config import Config
from megatron_async_rl.model.flops import nominal_tflops
from megatron_async_rl.trainer.algorithms.loss import MAXIMA, SUMS, USER
from megatron_async_rl.trainer.data.microbatch import Microbatch
from megatron_async_rl.trainer.model.build import TrainerModel

PACKING_SUMS = ("packed", "budget", "least_budget", "cost", "microbatches")


def packing_sums(minibatch: list[Microbatch], budget: int) -> list[float]:
    """Returns PACKING_SUMS of this rank's micro-batches; cost is in FLOPs, the first three
    tokens."""
    costs = [microbatch.cost for microbatch in minibatch]
    tokens = sum(microbatch.num_tokens for microbatch in minibatch)
    needed = max(1, math.ceil(tokens / budget))
    return [tokens, len(costs) * budget, needed * budget, sum(costs), len(costs)]


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Returns the step's metrics: token means over its minibatches, maxima, mean gradient norm.

    Those of the mismatch are absent if the step had no tokens to compare.
    """
    user = [name for name in steps[0] if name.startswith(USER)]
    total = {name: sum(step[name] for step in steps) for name in (*SUMS, *user, *PACKING_SUMS)}
    largest = {name: max(step[name] for step in steps) for name in (*MAXIMA, "cost_max")}
    tokens = max(total["tokens"], 1)
    overflowed = sum(step["overflowed"] for step in steps)
    mismatch = {}
    if compared_tokens := total["compared_tokens"]:
        mismatch = {
            "train/logprob_diff_mean": total["logprob_diff"] / compared_tokens,
            "train/logprob_diff_max": largest["logprob_diff_max"],
            "train/mismatch_kl": total["mismatch_kl"] / compared_tokens,
            "train/mismatch_beyond_cap_fraction": total["mismatch_beyond_cap"] / compared_tokens,
        }
    return mismatch | {
        "train/loss": total["loss"] / tokens,
        "train/grad_norm": sum(step["grad_norm"] for step in steps)
        / max(1, len(steps) - overflowed),
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
        "train/reference_kl": total["reference_kl"] / tokens,
        "train/stopped_minibatches": sum(step["stopped"] for step in steps),
        "train/overflowed_minibatches": overflowed,
        "train/current_version_fraction": total["current_tokens"] / tokens,
        "train/tokens": total["tokens"],
        "train/packed_tokens": total["packed"],
        "train/packing_efficiency": total["packed"] / max(total["budget"], 1),
        # No packing into whole micro-batches can be denser.
        "train/packing_bound": total["packed"] / max(total["least_budget"], 1),
        # Largest over mean FLOPs of a micro-batch: ranks and pipeline stages wait for the largest.
        "train/packing_imbalance": (
            largest["cost_max"] * total["microbatches"] / max(total["cost"], 1e-9)
        ),
        **{f"train/user/{name.removeprefix(USER)}": total[name] / tokens for name in user},
    }


def utilization(
    model: TrainerModel, cost: float, seconds: float, config: Config
) -> dict[str, float]:
    """Returns the rate of the model's FLOPs per rank, and its share of the GPU's.

    `cost`: of all packed sequences, in FLOPs of a token without attention.
    """
    flops = 6.0 * model.flops.weights * cost
    tflops = flops / max(seconds, 1e-9) / dist.get_world_size() / 1e12
    stats = {"perf/train_tflops_per_gpu": tflops}
    is_half = model.device.type == "cuda" and config.trainer.precision != "fp32"
    name = torch.cuda.get_device_name(model.device) if is_half else ""
    if nominal := nominal_tflops(name):
        stats["perf/mfu"] = tflops / nominal
    if measured := config.monitor.matrix_tflops:
        stats["perf/mfu_of_matrix_rate"] = tflops / measured
    return stats


def begin_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Returns the largest memory that a rank's tensors took since `begin_peak_memory`; collective.

    Empty on a CPU.
    """
    if device.type != "cuda":
        return {}
    peak = torch.tensor(torch.cuda.max_memory_allocated(device), dtype=torch.float64, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {"perf/trainer_peak_memory_gib": float(peak) / 2**30}
