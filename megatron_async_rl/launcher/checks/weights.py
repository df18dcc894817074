"""Checks that a model folder is complete, and that its weights are whole and fit its config.json.

A safetensors file begins with the length of its header (8 bytes) and the header, a JSON object:
tensor -> {dtype, shape, data_offsets}. So a download that was cut off is found without reading it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from operator import index
from pathlib import Path
from typing import Any

from megatron_async_rl.config.config import Config
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import DataError
from megatron_async_rl.launcher.checks.disk import size_text
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.shape import ModelShape, map_parameter, parameter_names
from megatron_async_rl.program import looked_up_in

_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
_POINTER = b"version https://git-lfs"  # a file that git has not fetched


def check_model_files(config: Config) -> str:
    """Checks that the folder is complete and can be read; model.random_init needs no weights."""
    path = Path(config.model.path)
    remedy = _download(path)
    if not path.is_dir():
        raise DataError(f"model.path = {path}: no such folder{looked_up_in(path)}", remedy)
    missing = [name for name in ("config.json", "tokenizer.json") if not (path / name).is_file()]
    weights = sorted(path.glob("*.safetensors"))
    if not config.model.random_init:
        listed = _listed_files(path, remedy)
        is_named = listed or (path / "model.safetensors").is_file()
        if not (is_named if config.has_trainer else weights):  # a server takes files of any name
            one_file = "model.safetensors" if weights else "*.safetensors"
            missing.append(_INDEX if len(weights) > 1 else one_file)
        missing += [file.name for file in listed if not file.is_file()]
        weights = listed or weights
    if missing and missing[0].endswith(".safetensors") and any(path.glob("pytorch_model*.bin")):
        remedy = (
            "convert the .bin files: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER), with transformers"
        )
    if missing:
        raise DataError(f"model.path = {path}: {', '.join(missing)} not in it", remedy)
    Tokenizer(path, config.reward.thinking_tags)
    if config.model.random_init:
        return f"{path}: random weights"
    check_weights(weights, config.has_trainer, remedy)
    return f"{path}: {size_text(sum(file.stat().st_size for file in weights))}"


def _listed_files(path: Path, remedy: str) -> list[Path]:
    """Returns the files of the index, the only ones that are loaded; none without an index."""
    index_file = path / _INDEX
    if not index_file.is_file():
        return []
    try:
        names = set(json.loads(index_file.read_bytes())["weight_map"].values())
        return sorted(path / name for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise DataError(f"model.path = {path}: cannot read {_INDEX}: {e}", remedy) from None


def _download(path: Path) -> str:
    """Returns the remedy for a folder without a whole model."""
    name = shlex.quote(str(path))
    is_empty = not any(path.glob("*"))
    if is_empty and path.name == "tiny_model":
        return f"python tools/make_tiny_model.py {name}"  # the quickstart's
    download = f"hf download OWNER/NAME --local-dir {name}"
    if not is_empty:
        return download
    return f"{download}; the examples in configs/ begin with the commands that make their models"


def check_model_weights(config: Config) -> str:
    """Checks that the files have the tensors that config.json describes.

    Quantized weights, which `run.mode=rollout_only` may have, are stored under other names.
    """
    path = Path(config.model.path)
    remedy = _download(path)
    files = _listed_files(path, remedy) or sorted(path.glob("*.safetensors"))
    stored = check_weights(files, config.has_trainer, remedy)
    hf_config = HfConfig(path)
    if not hf_config.quantization:
        check_tensors(stored, hf_config.shape(), f"model.path = {path}")
    return f"{len(stored):,} tensors"


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
