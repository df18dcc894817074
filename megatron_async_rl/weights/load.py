"""Fills this rank's model from a Hugging Face folder, reading its own shard of each tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from megatron_async_rl.errors import DataError
from megatron_async_rl.weights.folder import ModelFolder
from megatron_async_rl.weights.mapping import ModelShape, from_hf, place

Modules = GPTModel | Sequence[GPTModel]
"""A pipeline stage's part of the model: one module, or its chunks of an interleaved pipeline in order."""
_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def chunks(modules: Modules) -> list[GPTModel]:
    return [modules] if isinstance(modules, nn.Module) else list(modules)


def global_parameters(modules: Modules) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters in a fixed order, with the layers' and the experts' global numbers in their names."""
    for module in chunks(modules):
        offset = get_transformer_layer_offset(module.config, vp_stage=module.vp_stage)
        for name, parameter in module.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + offset)
            yield _global_expert(".".join(parts), module), parameter


def is_expert(name: str) -> bool:
    return ".local_experts." in name


def tensor_parallel(name: str) -> tuple[int, int]:
    """This rank and the number of ranks that cut the parameter: experts may be cut another way than the rest."""
    if is_expert(name):
        return mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()
    return mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()


@torch.no_grad()
def load_folder(modules: Modules, folder: ModelFolder, shape: ModelShape) -> None:
    for name, parameter in global_parameters(modules):
        for hf, size in place(name, shape).pieces:
            if folder.tensor_shape(hf) != size:
                raise DataError(
                    f"model.path = {folder.path}: {hf} has shape {folder.tensor_shape(hf)}, but by config.json it is {size}"
                )
        parameter.copy_(from_hf(name, folder.read, shape, *tensor_parallel(name)))


def _global_expert(name: str, module: GPTModel) -> str:
    if not is_expert(name):
        return name
    local = module.config.num_moe_experts // mpu.get_expert_model_parallel_world_size()
    first = local * mpu.get_expert_model_parallel_rank()
    return _LOCAL_EXPERT.sub(lambda match: f".local_experts.{int(match[1]) + first}.", name)
