"""Fills this rank's model from a Hugging Face folder, reading its own shard of each tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from megatron_async_rl.errors import DataError
from megatron_async_rl.weights.folder import ModelFolder
from megatron_async_rl.weights.mapping import ModelShape, from_hf, place


def global_parameters(module: GPTModel) -> Iterator[tuple[str, nn.Parameter]]:
    """This stage's parameters in a fixed order, with the layers' global numbers in their names."""
    offset = get_transformer_layer_offset(module.config)
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + offset)
        yield ".".join(parts), parameter


@torch.no_grad()
def load_folder(module: GPTModel, folder: ModelFolder, shape: ModelShape) -> None:
    rank, tp = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    for name, parameter in global_parameters(module):
        for hf, size in place(name, shape).pieces:
            if folder.tensor_shape(hf) != size:
                raise DataError(
                    f"model.path = {folder.path}: {hf} has shape {folder.tensor_shape(hf)}, but by config.json it is {size}"
                )
        parameter.copy_(from_hf(name, folder.read, shape, rank, tp))
