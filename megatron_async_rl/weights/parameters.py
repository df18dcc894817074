"""This rank's parameters under global names, and its place in the groups that split them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

Modules = Sequence[GPTModel]
"""A pipeline stage's part of the model: one module, or the chunks of an interleaved pipeline."""
_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def global_parameters(modules: Modules) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields this rank's parameters in a fixed order, with global layer and expert numbers."""
    for module in modules:
        offset = get_transformer_layer_offset(module.config, vp_stage=module.vp_stage)
        for name, parameter in module.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + offset)
            yield _global_expert(".".join(parts), module), parameter


def is_expert(name: str) -> bool:
    return ".local_experts." in name


def tensor_parallel(name: str) -> tuple[int, int]:
    """Returns (rank, size) of the group that splits the parameter. Experts may have their own."""
    if is_expert(name):
        return mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()
    return mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()


def _global_expert(name: str, module: GPTModel) -> str:
    if not is_expert(name):
        return name
    local = module.config.num_moe_experts // mpu.get_expert_model_parallel_world_size()
    first = local * mpu.get_expert_model_parallel_rank()
    return _LOCAL_EXPERT.sub(lambda match: f".local_experts.{int(match[1]) + first}.", name)
