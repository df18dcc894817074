"""Block-scaled fp8 weights, as in the FP8 checkpoints of DeepSeek and Qwen3 (weights.quantization).

The weight of a linear layer of the decoder is two tensors, NAME in float8 e4m3 and NAME_scale_inv
in float32, with one scale per block of 128 x 128 elements: weight = fp8 * scale. Embeddings, norms,
biases, routers and lm_head stay as they are. weights/quantization.py computes both tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.engine.engine_layout import engine_ranges, engine_split
from megatron_async_rl.model.shape import ModelShape, map_parameter, parameter_names

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
_PLAIN = ("embed_tokens.weight", "lm_head.weight", ".mlp.gate.weight")
_LINEAR = re.compile(r"model\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj\.weight")


def is_quantized(name: str) -> bool:
    """Returns whether the Hugging Face tensor becomes fp8."""
    return _LINEAR.fullmatch(name) is not None


def scale_shape(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the scales of a weight of whole blocks."""
    return tuple(size // BLOCK for size in sizes)


def quantization_config(config: Config) -> dict[str, Any]:
    """Returns `quantization_config` of config.json for the run's servers; empty without fp8.

    SGLang builds its layers by it, and has no fp8 for the modules that it lists.
    """
    if not config.sends_fp8:
        return {}
    shape = HfConfig(config.model.path).shape()
    plain = {hf.removesuffix(".weight") for hf, _ in _matrices(shape) if not is_quantized(hf)}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(plain | {"lm_head"}),
    }


def check_engine(shape: ModelShape, engine_tp: int) -> None:
    """Raises ConfigError unless every rank of a server holds whole blocks of every fp8 weight.

    Also refuses models with other linear layers, which SGLang may fuse or compute in its own way.
    """
    for hf, sizes in _matrices(shape):
        if not is_quantized(hf):
            if not hf.endswith(_PLAIN):
                raise ConfigError(
                    f"weights.quantization = fp8_block is not for {shape.family.name}, whose {hf} "
                    "is no projection of plain attention or of an MLP",
                    "remove weights.quantization",
                )
            continue
        leaf, held = hf.split(".")[-2], list(sizes)
        split = engine_split(leaf, len(sizes))
        if split is not None:
            start, end = engine_ranges(leaf, sizes, shape, engine_tp)[0]
            held[split] = end - start
        if any(size % BLOCK for size in held):
            raise ConfigError(
                f"weights.quantization = fp8_block has blocks of {BLOCK} x {BLOCK} elements, which "
                f"do not divide {hf}: {held[0]} x {held[1]} on a rank of a server with "
                f"sglang.tp_size = {engine_tp}",
                f"remove weights.quantization{', or lower sglang.tp_size' * (engine_tp > 1)}",
            )


def _matrices(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the weight matrices by Hugging Face name; of the experts of a layer only the first."""
    for name in parameter_names(shape):
        if ".local_experts." not in name or ".local_experts.0." in name:
            for hf, sizes in map_parameter(name, shape).pieces:
                if len(sizes) > 1:
                    yield hf, sizes
