"""Fills this rank's model: from the safetensors files of a Hugging Face folder, or at random.

A rank reads only the rows or columns that it holds, so it never has more of the model in memory
than its own shards and one slice.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_async_rl.errors import DataError
from megatron_async_rl.model.shape import ModelShape, map_parameter
from megatron_async_rl.weights.mapping import Index, from_hf
from megatron_async_rl.weights.parameters import Modules, global_parameters, tensor_parallel

_RANDOM_STD = 0.02


class SafetensorsFolder:
    """Reads parts of tensors from a Hugging Face folder, by name and index."""

    def __init__(self, path: str | Path) -> None:
        """Raises DataError if the folder has no weights."""
        self._path = Path(path)
        self._open: dict[str, Any] = {}
        index = self._path / "model.safetensors.index.json"
        single = self._path / "model.safetensors"
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            self._file_of = dict.fromkeys(self._file(single.name).keys(), single.name)
        else:
            raise DataError(
                f"model.path = {self._path} has neither {single.name} nor {index.name}",
                "convert the weights to safetensors",
            )

    def read(self, name: str, index: Index) -> Tensor:
        """Returns part of a tensor, in the stored element type. Raises DataError if missing."""
        return self._slice(name)[index]

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        """Returns safetensors' lazy handle on a tensor."""
        if name not in self._file_of:
            raise DataError(
                f"model.path = {self._path} has no tensor {name}, which the model needs",
                "download the model again",
            )
        return self._file(self._file_of[name]).get_slice(name)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(str(self._path / name), framework="pt")
        return self._open[name]


@torch.no_grad()
def load_folder(modules: Modules, model_path: str | Path, shape: ModelShape) -> None:
    """Loads this rank's shards. Raises DataError if a tensor is missing or has another shape."""
    folder = SafetensorsFolder(model_path)
    for local in global_parameters(modules):
        name = local.name
        for hf, size in map_parameter(name, shape).pieces:
            stored = folder.tensor_shape(hf)
            if stored != size:
                raise DataError(
                    f"model.path = {model_path}: {hf} has shape {stored}, but {size} according to "
                    "config.json",
                    "download the model again",
                )
        local.data.copy_(from_hf(name, folder.read, shape, *tensor_parallel(name)))


@torch.no_grad()
def fill_random(modules: Modules, shape: ModelShape, seed: int) -> None:
    """Draws this rank's weights from a normal distribution; norms keep their initial ones.

    Each Hugging Face tensor is drawn whole from its own generator and then sliced, so all layouts
    get the same weights on the same kind of device.
    """
    for local in global_parameters(modules):
        name = local.name
        if name.endswith(("norm.weight", "norm_weight")):
            continue
        sizes, device = dict(map_parameter(name, shape).pieces), local.parameter.device

        def draw(hf: str, index: Index, sizes: Any = sizes, device: Any = device) -> Tensor:
            generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {hf}".encode()))
            whole = torch.randn(sizes[hf], generator=generator, device=device)
            return (whole * _RANDOM_STD)[index]

        local.data.copy_(from_hf(name, draw, shape, *tensor_parallel(name)))
