"""The digest that SGLang's /weights_checker gives of a tensor on a GPU (0.5.16 to 0.5.23), as arithmetic of our own.

The tensor's bytes are 32-bit words v_i, the last one filled up with zeros. With mix() MurmurHash3's 32-bit finalizer:

    a_i = mix(v_i ^ ((i * POSITION[0] + SEED[0]) ^ rotl(i, 15)))        b_i the same with [1] and rotl(i, 13)
    tile t of 8192 words:  high_t = mix(sum a_i ^ num_bytes)            low_t = mix(sum b_i ^ num_bytes)     mod 2^32
    digest = splitmix64's finalizer of  sum over t of (high_t << 32 | low_t)                                 mod 2^64

Everything but the tile's own sum is a plain sum, so tiles may be hashed in any order and place. On a GPU a triton kernel
does it at the memory's rate; elsewhere, and where triton is missing, torch's integer operations.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_WORDS = 8192
MIX = (0x85EBCA6B, 0xC2B2AE35)
POSITION = (0x27D4EB2D, 0x165667B1)
SEED = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
_LOW = 0xFFFFFFFF
_CHUNK_TILES = 128  # of torch's operations: bounds what they take beside the tensor


def as_words(tensor: Tensor) -> Tensor:
    """[num_words] int32: the tensor's bytes, without a copy where it is contiguous and a multiple of four bytes."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return (
        F.pad(raw, (0, -len(raw) % 4)).view(torch.int32) if len(raw) % 4 else raw.view(torch.int32)
    )


def add_tile_sum(
    words: Tensor, total: Tensor, first: int = 0, num_bytes: int | None = None
) -> None:
    """Adds the sum over the tiles of `words` ([num_words] int32) to `total`, one int64 on the same device.

    They may be part of a tensor of `num_bytes`, from its word `first` on, if they are whole tiles of it.
    """
    if not len(words):
        return
    num_bytes = 4 * len(words) if num_bytes is None else num_bytes
    kernels = _kernels() if words.is_cuda else None
    if kernels is not None:
        kernels.add_tile_sum(words, total, first, num_bytes)
        return
    for start in range(0, len(words), _CHUNK_TILES * TILE_WORDS):
        part = words[start : start + _CHUNK_TILES * TILE_WORDS]
        total += _tile_sum(part, first + start, num_bytes)


def finish(total: int) -> str:
    """The digest, 16 hex digits, from the sum over all tiles (as signed or unsigned 64 bits)."""
    x = total & (1 << 64) - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * factor & (1 << 64) - 1
    return f"{x ^ (x >> 31):016x}"


def _tile_sum(words: Tensor, start: int, num_bytes: int) -> Tensor:
    """Of whole tiles (the last may be short) beginning at word `start`. int64 holds unsigned 32-bit values throughout."""
    index = torch.arange(start, start + len(words), device=words.device)
    value = words.to(torch.int64) & _LOW
    halves = []
    for position, seed, turn in zip(POSITION, SEED, (15, 13), strict=True):
        turned = ((index << turn) | (index >> (32 - turn))) & _LOW
        mixed = _mix(value ^ ((index * position + seed) & _LOW) ^ turned)
        tiles = F.pad(mixed, (0, -len(mixed) % TILE_WORDS)).view(-1, TILE_WORDS).sum(1)
        halves.append(_mix((tiles & _LOW) ^ (num_bytes & _LOW)))
    return ((halves[0] << 32) | halves[1]).sum()


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((16, MIX[0]), (13, MIX[1])):
        x = (
            x ^ (x >> shift)
        ) * factor & _LOW  # int64 products wrap around: their low 32 bits are right
    return x ^ (x >> 16)


@cache
def _kernels() -> ModuleType | None:
    try:
        from megatron_async_rl.weights import tile_hash_triton
    except ImportError:
        return None
    return tile_hash_triton
