"""Megatron's shards to full Hugging Face tensors, one parameter at a time, per pipeline stage.

Stages know nothing of each other: each yields the HF tensors of its own layers, so all stages can send at once. Within
a stage the tensor-parallel ranks walk the same parameters in the same order, and each parameter is one all-gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_async_rl.weights.load import global_parameters
from megatron_async_rl.weights.mapping import ModelShape, place, to_hf


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: str
    """Megatron's name of what it is part of."""


def _owned(module: GPTModel, shape: ModelShape) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters this stage answers for: the last stage's copy of a tied embedding is the first one's."""
    for name, parameter in global_parameters(module):
        if not (shape.tied and name == "output_layer.weight"):
            yield name, parameter


def manifest(module: GPTModel, shape: ModelShape, dtype: torch.dtype | None = None) -> list[TensorInfo]:
    """What hf_tensors will yield on this stage, in order, without moving data."""
    return [
        TensorInfo(hf, size, dtype or parameter.dtype, name)
        for name, parameter in _owned(module, shape)
        for hf, size in place(name, shape).pieces
    ]


@torch.no_grad()
def hf_tensors(
    module: GPTModel,
    shape: ModelShape,
    dtype: torch.dtype | None = None,
    get: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data,
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, full tensor) of this pipeline stage, gathered over tensor parallelism.

    Collective: every tensor-parallel rank of the stage must exhaust it. All ranks get the tensors; usually only the
    first has a use for them. A yielded tensor may share memory with the parameter: send or copy it before the next
    optimizer step. `get` picks what is gathered, such as a parameter's main_grad.
    """
    group = mpu.get_tensor_model_parallel_group()
    for name, parameter in _owned(module, shape):
        local = get(parameter)
        local = local.to(dtype or local.dtype).contiguous()
        shards = [local]
        if group.size() > 1 and place(name, shape).rule.split is not None:
            shards = [torch.empty_like(local) for _ in range(group.size())]
            dist.all_gather(shards, local, group=group)
        yield from to_hf(name, shards, shape)
