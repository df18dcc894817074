"""Checks that the weight files of a model folder are whole and fit its config.json.

A safetensors file begins with the length of its header (8 bytes) and the header, a JSON object:
tensor -> {dtype, shape, data_offsets}. So a download that was cut off is found without reading it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from operator import index
from pathlib import Path
from typing import Any

from megatron_async_rl.errors import DataError
from megatron_async_rl.model.shape import ModelShape, map_parameter, parameter_names

_FLOATS = {"F64", "F32", "F16", "BF16"}
_MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
_POINTER = b"version https://git-lfs"  # a file that git has not fetched


def check_weights(files: Iterable[Path], trains: bool, remedy: str) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor.

    Raises DataError for a file that is damaged, or with `trains` has quantized weights.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                start = file.read(len(_POINTER))
                file.seek(8)
                length = int.from_bytes(start[:8], "little")
                size = path.stat().st_size
                is_header = len(start) > 8 and length < min(size, _MAX_HEADER)
                header = json.loads(file.read(length)) if is_header else {}
            tensors: dict[str, Any] = {k: v for k, v in header.items() if k != "__metadata__"}
            ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
            shapes |= {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
            end = index(max(ends, default=-1))  # TypeError for another type
        except OSError as e:
            raise DataError(f"{path} cannot be read: {e.strerror}", remedy) from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            end = -1
        if start == _POINTER:
            raise DataError(f"{path} is a pointer of git lfs, without the weights", "git lfs pull")
        if end < 0 or 8 + length + end != size:
            found = f"{size:,} bytes" + (f" of {8 + length + end:,}" if end >= 0 else "")
            raise DataError(f"{path} is damaged or was cut off: it has {found}", remedy)
        for name, tensor in tensors.items():
            if trains and name.endswith("weight") and tensor.get("dtype") not in _FLOATS:
                raise DataError(
                    f"{path}: {name} is stored as {tensor.get('dtype')}, and quantized weights "
                    "cannot be trained",
                    "use the folder of the same model in bfloat16, float16 or float32",
                )
    return shapes


def check_tensors(stored: Mapping[str, tuple[int, ...]], shape: ModelShape, setting: str) -> None:
    """Raises DataError for a tensor that the model needs, and which is missing or of another shape.

    The trainer would find it too, but only when it loads the model.
    """
    for parameter in parameter_names(shape):
        for name, size in map_parameter(parameter, shape).pieces:
            if name not in stored:
                tied = "set tie_word_embeddings to true in config.json, if the output layer is the "
                raise DataError(
                    f"{setting} has no tensor {name}, which the model needs by its config.json",
                    (f"{tied}embedding, or " if name == "lm_head.weight" else "")
                    + "download the model again",
                )
            if stored[name] != size:
                raise DataError(
                    f"{setting}: {name} has shape {stored[name]}, but {size} according to "
                    "config.json",
                    "download the model again",
                )
