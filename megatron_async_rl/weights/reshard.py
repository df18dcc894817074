"""Gathers Megatron's shards into full Hugging Face tensors, one parameter at a time.

Each pipeline stage yields the tensors of its own layers, so all stages can send at once. Within a
stage the tensor-parallel ranks go through the same parameters in the same order, with one
all-gather per parameter.

    own_tensors   experts stay with the expert-parallel rank that holds them; each of these ranks
                  is a weight source. For updates, snapshots and exports
    hf_tensors    experts are gathered over expert parallelism too, where one rank needs them all

Everything but the experts comes first. During that part a rank waits only for its tensor-parallel
peers, so a source of experts can help to gather the tensors of the stage's first rank, although
servers take that rank's buckets before its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from megatron_async_rl.model.engine.block_fp8 import is_quantized
from megatron_async_rl.model.shape import ModelShape, map_parameter
from megatron_async_rl.weights.mapping import to_hf
from megatron_async_rl.weights.parameters import (
    LocalParameter,
    Modules,
    global_parameters,
    is_expert,
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A Hugging Face tensor that is about to be yielded."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bucket: str
    """Global name of a Megatron parameter; tensors with the same name come in one bucket."""


def takes_part() -> bool:
    """Returns True if this rank's shards are gathered.

    These ranks are the first replica of a stage and the first holders of experts. The other
    data-parallel replicas and context-parallel ranks hold the same weights.
    """
    return is_first_replica() or mpu.get_expert_data_parallel_rank() == 0


def is_first_replica() -> bool:
    return mpu.get_data_parallel_rank() == mpu.get_context_parallel_rank() == 0


def is_first_of_stage() -> bool:
    return is_first_replica() and mpu.get_tensor_model_parallel_rank() == 0


def is_source() -> bool:
    """Returns True if this rank is a weight source, that is if own_tensors yields anything here.

    Sources are the first rank of a stage and, with expert parallelism, the first rank of each
    expert-parallel rank's holders.
    """
    return is_first_of_stage() or (num_expert_owners() > 1 and _is_expert_owner())


def num_expert_owners() -> int:
    """Returns the number of sources in a pipeline stage: one per expert-parallel rank."""
    return mpu.get_expert_model_parallel_world_size()


def source_number() -> int:
    """Returns this source's index among all, by stage; a stage's first rank comes first."""
    return (
        mpu.get_pipeline_model_parallel_rank() * num_expert_owners()
        + mpu.get_expert_model_parallel_rank()
    )


def own_tensor_infos(
    modules: Modules, shape: ModelShape, dtype: torch.dtype | None = None
) -> list[TensorInfo]:
    """Returns the tensors that own_tensors will yield on this rank, without moving data."""
    return [
        TensorInfo(hf, size, _sent_dtype(p, shape, dtype), map_parameter(p.name, shape).bucket)
        for p in _sent_parameters(modules, shape)
        if (_is_expert_owner() if is_expert(p.name) else is_first_of_stage())
        for hf, size in map_parameter(p.name, shape).pieces
    ]


@torch.no_grad()
def own_tensors(
    modules: Modules, shape: ModelShape, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, full tensor) of all that this weight source sends.

    Collective: every rank of the stage that `takes_part` must exhaust it; a rank that is no source
    yields nothing. A tensor may share memory with the parameter: send or copy it before the next
    optimizer step.
    """
    for parameter in _sent_parameters(modules, shape):
        name = parameter.name
        if is_expert(name):
            gathers, sends = mpu.get_expert_data_parallel_rank() == 0, _is_expert_owner()
        else:
            gathers, sends = is_first_replica(), is_first_of_stage()
        if not gathers:
            continue
        local = parameter.data.to(_sent_dtype(parameter, shape, dtype)).contiguous()
        rule = map_parameter(name, shape).rule
        shards = local[None] if rule.split is None else _gather(local, _split_group(name))
        if rule.split == 0 and rule.join == "one":
            # The shards are adjacent: to_hf needs no second copy of a large embedding.
            shards = shards.flatten(0, 1)[None]
        if sends:
            yield from to_hf(name, list(shards), shape)


@torch.no_grad()
def hf_tensors(
    modules: Modules,
    shape: ModelShape,
    dtype: torch.dtype | None = None,
    get: Callable[[nn.Parameter], Tensor] | None = None,
    only_experts: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, full tensor) of this stage, experts of all ranks included.

    Collective as own_tensors. Use the result of the first replica; with expert parallelism other
    ranks yield the experts alone. `get` selects another tensor of the parameters to gather, such as
    main_grad.
    """
    for parameter in _sent_parameters(modules, shape):
        local_name = parameter.name
        skips_dense = only_experts or (num_expert_owners() > 1 and not is_first_replica())
        if skips_dense and not is_expert(local_name):
            continue
        if get is None:
            local = parameter.data.to(_sent_dtype(parameter, shape, dtype)).contiguous()
        elif isinstance(parameter.parameter, nn.Parameter):
            local = parameter.part_of(get(parameter.parameter))
            local = local.to(dtype or local.dtype).contiguous()
        else:
            continue
        names = _names_on_all_ranks(local_name, shape)
        is_split = map_parameter(local_name, shape).rule.split is not None
        if len(names) > 1 and is_split:
            shards = _gather(local, mpu.get_expert_tensor_and_model_parallel_group())
        elif len(names) > 1:
            shards = _gather(local, mpu.get_expert_model_parallel_group())
        else:
            shards = _gather(local, _split_group(local_name)) if is_split else local[None]
        # In the joint group, the tensor-parallel ranks of one expert-parallel rank are adjacent.
        for name, expert_shards in zip(names, shards.chunk(len(names)), strict=True):
            yield from to_hf(name, list(expert_shards), shape)


def _is_expert_owner() -> bool:
    return mpu.get_expert_data_parallel_rank() == 0 and mpu.get_expert_tensor_parallel_rank() == 0


def _sent_parameters(modules: Modules, shape: ModelShape) -> list[LocalParameter]:
    """Returns the parameters of this stage that are sent, experts last, before them float32.

    Those that quantization turns into fp8 are adjacent, for large buckets (bucket.py). The last
    stage's copy of a tied embedding is left out: the first stage sends it.
    """
    named = [
        p
        for p in global_parameters(modules)
        if not (shape.tied and p.name == "output_layer.weight")
    ]

    position = {p.name: number for number, p in enumerate(named)}

    def order(p: LocalParameter) -> tuple[bool, bool, bool, int]:
        mapping = map_parameter(p.name, shape)
        is_fp8 = is_quantized(mapping.pieces[0][0])
        return is_expert(p.name), mapping.rule.fp32, is_fp8, position[mapping.bucket]

    return sorted(named, key=order)


def _sent_dtype(p: LocalParameter, shape: ModelShape, dtype: torch.dtype | None) -> torch.dtype:
    if map_parameter(p.name, shape).rule.fp32:
        return torch.float32
    return dtype or p.parameter.dtype


def _names_on_all_ranks(name: str, shape: ModelShape) -> list[str]:
    """Returns an expert parameter's names on all expert-parallel ranks; otherwise `name` alone."""
    ranks = num_expert_owners()
    if not is_expert(name) or ranks == 1:
        return [name]
    per_rank = shape.num_experts // ranks
    prefix, number, suffix = re.split(r"(?<=\.local_experts\.)(\d+)", name)
    return [f"{prefix}{int(number) % per_rank + rank * per_rank}{suffix}" for rank in range(ranks)]


def _split_group(name: str) -> dist.ProcessGroup:
    """Returns the tensor-parallel group that splits a parameter."""
    if is_expert(name):
        return mpu.get_expert_tensor_parallel_group()
    return mpu.get_tensor_model_parallel_group()


def _gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns all ranks' tensors of this shape: [ranks, *shape]."""
    if group.size() == 1:
        return local[None]
    shards = local.new_empty(group.size(), *local.shape)
    dist.all_gather_into_tensor(shards.flatten(0, 1), local, group=group)
    return shards
