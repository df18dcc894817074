"""Megatron's shards to full Hugging Face tensors, one parameter at a time, per pipeline stage.

Stages know nothing of each other: each yields the HF tensors of its own layers, so all stages can send at once. Within
a stage the tensor-parallel ranks walk the same parameters in the same order, and each parameter is one all-gather.

    own_tensors   experts stay with the expert-parallel rank that holds them: every owner yields its own. The way to the
                  servers and to the disk
    hf_tensors    experts are gathered over expert parallelism too: for what needs them all in one place

Everything but the experts comes first. While it is gathered no rank waits for anything but its tensor-parallel peers,
so an owner of experts may help to gather what another rank sends, although a server takes that rank's buckets first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from megatron_async_rl.model.families import ModelShape, map_parameter
from megatron_async_rl.weights.mapping import to_hf
from megatron_async_rl.weights.parameters import Modules, global_parameters, is_expert


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
    return is_first_replica() or mpu.get_expert_data_parallel_rank() == 0


def is_first_replica() -> bool:
    return mpu.get_data_parallel_rank() == mpu.get_context_parallel_rank() == 0


def is_first_of_stage() -> bool:
    return is_first_replica() and mpu.get_tensor_model_parallel_rank() == 0


def is_source() -> bool:
    """Whether own_tensors yields anything here: on the first rank of the stage, and the first of each expert-parallel
    rank's, which differ from it only in their experts."""
    return is_first_of_stage() or (num_expert_owners() > 1 and _is_expert_owner())


def num_expert_owners() -> int:
    """Sources of a pipeline stage: the stage's first rank, who owns experts too, and the other expert-parallel ranks'."""
    return mpu.get_expert_model_parallel_world_size()


def source_number() -> int:
    """Of a source, its place among all: stage after stage, the one with everything but experts first."""
    return (
        mpu.get_pipeline_model_parallel_rank() * num_expert_owners()
        + mpu.get_expert_model_parallel_rank()
    )


def _is_expert_owner() -> bool:
    return mpu.get_expert_data_parallel_rank() == 0 and mpu.get_expert_tensor_parallel_rank() == 0


def _owned(modules: Modules, shape: ModelShape) -> list[tuple[str, nn.Parameter]]:
    """The parameters this stage answers for, experts last: the last stage's copy of a tied embedding is the first's."""
    named = [
        p for p in global_parameters(modules) if not (shape.tied and p[0] == "output_layer.weight")
    ]
    return sorted(named, key=lambda pair: is_expert(pair[0]))


def _experts(name: str, shape: ModelShape) -> list[str]:
    """The names of the parameter on all expert-parallel ranks, in rank order."""
    ranks = num_expert_owners()
    if not is_expert(name) or ranks == 1:
        return [name]
    per_rank = shape.num_experts // ranks
    prefix, number, suffix = re.split(r"(?<=\.local_experts\.)(\d+)", name)
    return [f"{prefix}{int(number) % per_rank + rank * per_rank}{suffix}" for rank in range(ranks)]


def manifest(
    modules: Modules, shape: ModelShape, dtype: torch.dtype | None = None
) -> list[TensorInfo]:
    """What hf_tensors will yield on this stage, in order, without moving data."""
    return [
        TensorInfo(hf, size, dtype or parameter.dtype, one)
        for name, parameter in _owned(modules, shape)
        for one in _experts(name, shape)
        for hf, size in map_parameter(one, shape).pieces
    ]


def own_manifest(
    modules: Modules, shape: ModelShape, dtype: torch.dtype | None = None
) -> list[TensorInfo]:
    """What own_tensors will yield on this rank."""
    return [
        TensorInfo(hf, size, dtype or parameter.dtype, name)
        for name, parameter in _owned(modules, shape)
        if (_is_expert_owner() if is_expert(name) else is_first_of_stage())
        for hf, size in map_parameter(name, shape).pieces
    ]


@torch.no_grad()
def own_tensors(
    modules: Modules, shape: ModelShape, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, full tensor) of what leaves from this rank; nothing on a rank that only helps to gather.

    Collective: every rank of the stage that `takes_part` must exhaust it. A yielded tensor may share memory with the
    parameter: send or copy it before the next optimizer step.
    """
    for name, parameter in _owned(modules, shape):
        holds, sends = (
            (mpu.get_expert_data_parallel_rank() == 0, _is_expert_owner())
            if is_expert(name)
            else (is_first_replica(), is_first_of_stage())
        )
        if not holds:
            continue
        local = parameter.data.to(dtype or parameter.dtype).contiguous()
        rule = map_parameter(name, shape).rule
        shards = local[None] if rule.split is None else _gather(local, _cutting_group(name))
        if rule.split == 0 and rule.join == "one":
            shards = shards.flatten(0, 1)[
                None
            ]  # they are whole as they lie: no second copy of a vocabulary's matrix
        if sends:
            yield from to_hf(name, list(shards), shape)


@torch.no_grad()
def hf_tensors(
    modules: Modules,
    shape: ModelShape,
    dtype: torch.dtype | None = None,
    get: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data,
    only_experts: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, full tensor) of this pipeline stage, gathered over tensor and expert parallelism.

    Collective as own_tensors. Of use to the first replica's ranks, usually the first of them: the others yield the
    experts alone. `get` picks what is gathered, such as a parameter's main_grad.
    """
    for name, parameter in _owned(modules, shape):
        if not is_expert(name) and (
            only_experts or (num_expert_owners() > 1 and not is_first_replica())
        ):
            continue
        local = get(parameter)
        local = local.to(dtype or local.dtype).contiguous()
        names, is_cut = _experts(name, shape), map_parameter(name, shape).rule.split is not None
        if len(names) > 1:
            joint, over_experts = (
                mpu.get_expert_tensor_and_model_parallel_group(),
                mpu.get_expert_model_parallel_group(),
            )
            shards = _gather(local, joint if is_cut else over_experts)
        else:
            shards = _gather(local, _cutting_group(name)) if is_cut else local[None]
        per_expert = len(shards) // len(
            names
        )  # expert-parallel ranks are the outer ones of the joint group
        for number, one in enumerate(names):
            yield from to_hf(
                one, list(shards[number * per_expert : (number + 1) * per_expert]), shape
            )


def _cutting_group(name: str) -> dist.ProcessGroup:
    return (
        mpu.get_expert_tensor_parallel_group()
        if is_expert(name)
        else mpu.get_tensor_model_parallel_group()
    )


def _gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' tensors of this shape: [ranks, *shape]."""
    if group.size() == 1:
        return local[None]
    shards = local.new_empty(group.size(), *local.shape)
    dist.all_gather_into_tensor(shards.flatten(0, 1), local, group=group)
    return shards
