"""Quantizes Hugging Face tensors on their way to the servers (weights.quantization).

Whole tensors are quantized, after the gather, so that every trainer and engine layout has the same
bytes. model/engine/block_fp8.py says which tensors, and under which names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_async_rl.errors import PublishError
from megatron_async_rl.model.engine.block_fp8 import BLOCK, SCALE_SUFFIX, is_quantized, scale_shape
from megatron_async_rl.weights.reshard import TensorInfo

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max  # 448
# The scale of a block of zeros; smaller ones would make a quotient infinite.
_MIN_SCALE = 2.0**-100
_CHUNK_ELEMENTS = 1 << 24  # computed at a time, to bound the memory of float32 copies


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (fp8, scales) of a weight [n, k] of whole blocks: [n, k] and [n/128, k/128] float32.

    A block's scale is its largest magnitude / 448; fp8 = weight / scale, rounded to nearest even.
    So |weight - fp8 * scale| <= max(2^-4 |weight|, 2^-10 scale). The scales are not finite if the
    weight is not.
    """
    fp8 = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty(scale_shape(weight.shape), dtype=torch.float32, device=weight.device)
    rows = max(1, _CHUNK_ELEMENTS // (BLOCK * weight.size(1)))  # of blocks
    for chunk, out, scale in zip(
        weight.split(rows * BLOCK), fp8.split(rows * BLOCK), scales.split(rows), strict=True
    ):
        blocks = chunk.reshape(-1, BLOCK, chunk.size(1) // BLOCK, BLOCK)
        scale.copy_(blocks.abs().amax((1, 3)))
        scale.div_(_FP8_MAX).clamp_(min=_MIN_SCALE)
        out.copy_((blocks.float() / scale[:, None, :, None]).view(chunk.shape))
    return fp8, scales


class Quantizer:
    """Quantizes tensors one after the other, without waiting for the device before `check`."""

    def __init__(self) -> None:
        self._scales: list[tuple[str, Tensor]] = []  # the largest scale of each weight

    def __call__(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors under their names; for an fp8 weight its fp8 tensor and its scales."""
        for name, tensor in tensors:
            if not is_quantized(name):
                yield name, tensor
                continue
            fp8, scales = quantize_blocks(tensor)
            self._scales.append((name, scales.max()))
            yield name, fp8
            yield name + SCALE_SUFFIX, scales

    def check(self) -> None:
        """Raises PublishError with the first weight that had a NaN or an infinity."""
        if not self._scales:
            return
        finite = torch.stack([scale for _, scale in self._scales]).isfinite().tolist()
        for (name, _), is_finite in zip(self._scales, finite, strict=True):
            if not is_finite:
                raise PublishError(
                    f"{name} has a NaN or an infinity, which fp8 cannot represent",
                    "lower megatron.lr, and start over from a policy before it",
                )
        self._scales = []


def quantized_infos(infos: Iterable[TensorInfo]) -> Iterator[TensorInfo]:
    """Yields the TensorInfo of each tensor that a Quantizer makes of these."""
    for info in infos:
        if not is_quantized(info.name):
            yield info
            continue
        yield dataclasses.replace(info, dtype=FP8)
        yield dataclasses.replace(
            info,
            name=info.name + SCALE_SUFFIX,
            shape=scale_shape(info.shape),
            dtype=torch.float32,
        )
