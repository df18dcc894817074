"""This rank's parameters under global names, and its place in the groups that split them.

Experts are named `local_experts.N` with N counted over all expert-parallel ranks, however Megatron
stores them: as modules (SequentialMLP), as numbered weights of one module (Transformer Engine's
GroupedLinear), or stacked in one parameter (trainer/model/experts.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

Modules = Sequence[GPTModel]
"""A pipeline stage's part of the model: one module, or the chunks of an interleaved pipeline."""
_EXPERT_MODULE = re.compile(r"\.local_experts\.(?P<number>\d+)(?P<rest>\..*)")
_GROUPED_EXPERT = re.compile(r"(?<=\.experts)(?P<rest>\.linear_fc[12]\.weight)(?P<number>\d*)")


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A parameter of this rank, or the part of one expert of a parameter that stacks them.

    A router's bias is a buffer: the optimizer does not train it.
    """

    name: str
    """With global layer and expert numbers."""
    parameter: Tensor
    row: int | None = None
    """The expert's position in the stack."""

    def part_of(self, tensor: Tensor) -> Tensor:
        """Returns the part of the parameter's data, gradient or other state of its shape."""
        return tensor if self.row is None else tensor[self.row]

    @property
    def data(self) -> Tensor:
        return self.part_of(self.parameter.data)


def global_parameters(modules: Modules) -> Iterator[LocalParameter]:
    """Yields this rank's parameters in a fixed order."""
    for module in modules:
        offset = get_transformer_layer_offset(module.config, vp_stage=module.vp_stage)
        experts = (module.config.num_moe_experts or 0) // mpu.get_expert_model_parallel_world_size()
        first = experts * mpu.get_expert_model_parallel_rank()
        for name, parameter in (*module.named_parameters(), *router_biases(module)):
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + offset)
            for canonical, row in expert_names(".".join(parts), experts, first):
                yield LocalParameter(canonical, parameter, row)


def router_biases(module: GPTModel) -> list[tuple[str, Tensor]]:
    """Returns the buffers that belong to the model's weights, by local name."""
    return [(n, b) for n, b in module.named_buffers() if n.endswith(".router.expert_bias")]


def expert_names(name: str, experts: int, first: int) -> list[tuple[str, int | None]]:
    """Returns the global names in a local parameter, with their rows in a stack, else None.

    `experts`: number on this rank; `first`: global number of its first.
    """
    found = _EXPERT_MODULE.search(name) or _GROUPED_EXPERT.search(name)
    if not found:
        return [(name, None)]
    head, rest, number = name[: found.start()], found["rest"], found["number"]
    if number:
        return [(f"{head}.local_experts.{int(number) + first}{rest}", None)]
    return [(f"{head}.local_experts.{first + row}{rest}", row) for row in range(experts)]


def is_expert(name: str) -> bool:
    return ".local_experts." in name


def tensor_parallel(name: str) -> tuple[int, int]:
    """Returns (rank, size) of the group that splits the parameter. Experts may have their own."""
    if is_expert(name):
        return mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()
    return mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()


def gloo_group(
    number: int, count: int, is_member: bool = True, timeout: timedelta | None = None
) -> dist.ProcessGroup | None:
    """Returns a gloo group of the members with the same number, below `count`; None for others.

    Collective over all ranks.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    numbers = torch.empty(dist.get_world_size(), dtype=torch.long, device=device)
    own = torch.tensor([number if is_member else -1], device=device)
    dist.all_gather_into_tensor(numbers, own)
    # every rank must create every group, in the same order
    groups = [
        dist.new_group((numbers == n).nonzero()[:, 0].tolist(), timeout, "gloo")
        for n in range(count)
    ]
    return groups[number] if is_member else None
