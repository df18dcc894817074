"""Megatron's shards to full Hugging Face tensors, one parameter at a time, per pipeline stage.

Stages know nothing of each other: each yields the HF tensors of its own layers, so all stages can send at once. Within
a stage the tensor-parallel ranks walk the same parameters in the same order, and each parameter is one all-gather; an
expert is one more, over the ranks that hold the other experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from megatron_async_rl.weights.load import Modules, global_parameters, is_expert
from megatron_async_rl.weights.mapping import ModelShape, place, to_hf


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: str
    """Megatron's name of what it is part of."""


def takes_part() -> bool:
    """Whether this rank has shards to give: the first replica of its stage, and whoever holds experts beside it.

    Other data-parallel replicas and context-parallel ranks have the same weights.
    """
    return is_first_replica() or (
        mpu.get_expert_model_parallel_world_size() > 1 and mpu.get_expert_data_parallel_rank() == 0
    )


def is_first_replica() -> bool:
    return mpu.get_data_parallel_rank() == mpu.get_context_parallel_rank() == 0


def _owned(modules: Modules, shape: ModelShape) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters this stage answers for: the last stage's copy of a tied embedding is the first one's."""
    for name, parameter in global_parameters(modules):
        if not (shape.tied and name == "output_layer.weight"):
            yield name, parameter


def _experts(name: str, shape: ModelShape) -> list[str]:
    """The names of the parameter on all expert-parallel ranks, in rank order."""
    ranks = mpu.get_expert_model_parallel_world_size()
    if not is_expert(name) or ranks == 1:
        return [name]
    per_rank = shape.num_experts // ranks
    prefix, number, suffix = re.split(r"(?<=\.local_experts\.)(\d+)", name)
    return [f"{prefix}{int(number) % per_rank + rank * per_rank}{suffix}" for rank in range(ranks)]


def manifest(modules: Modules, shape: ModelShape, dtype: torch.dtype | None = None) -> list[TensorInfo]:
    """What hf_tensors will yield on this stage, in order, without moving data."""
    return [
        TensorInfo(hf, size, dtype or parameter.dtype, one)
        for name, parameter in _owned(modules, shape)
        for one in _experts(name, shape)
        for hf, size in place(one, shape).pieces
    ]


@torch.no_grad()
def hf_tensors(
    modules: Modules,
    shape: ModelShape,
    dtype: torch.dtype | None = None,
    get: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data,
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, full tensor) of this pipeline stage, gathered over tensor and expert parallelism.

    Collective: every rank of the stage that `takes_part` must exhaust it. Of use to the first replica's ranks, usually
    the first of them: with expert parallelism the others yield the experts alone. A yielded tensor may share memory with
    the parameter: send or copy it before the next optimizer step. `get` picks what is gathered, such as a parameter's
    main_grad.
    """
    experts_only = mpu.get_expert_model_parallel_world_size() > 1 and not is_first_replica()
    for name, parameter in _owned(modules, shape):
        if experts_only and not is_expert(name):
            continue
        local = get(parameter)
        local = local.to(dtype or local.dtype).contiguous()
        tp = mpu.get_expert_tensor_parallel_group() if is_expert(name) else mpu.get_tensor_model_parallel_group()
        names = _experts(name, shape)
        cut = place(name, shape).rule.split is not None and tp.size() > 1
        group = mpu.get_expert_tensor_and_model_parallel_group() if len(names) > 1 and cut else tp
        if len(names) > 1 and not cut:
            group = mpu.get_expert_model_parallel_group()
        shards = [local]
        if cut or len(names) > 1:
            shards = [torch.empty_like(local) for _ in range(group.size())]
            dist.all_gather(shards, local, group=group)
        per_expert = len(shards) // len(names)  # expert-parallel ranks are the outer ones of the joint group
        for number, one in enumerate(names):
            yield from to_hf(one, shards[number * per_expert : (number + 1) * per_expert], shape)
