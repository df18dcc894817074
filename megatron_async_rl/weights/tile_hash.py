"""The digest of a tensor on a GPU as SGLang's /weights_checker computes it (0.5.16 to 0.5.23).

The tensor's bytes are 32-bit words v_i, the last one padded with zeros. With mix() MurmurHash3's
32-bit finalizer, POSITION, SEED and the rotations of the two halves a and b:

    a_i = mix(v_i ^ ((i * POSITION[0] + SEED[0]) ^ rotl(i, 15)))
    b_i = mix(v_i ^ ((i * POSITION[1] + SEED[1]) ^ rotl(i, 13)))
    high_t = mix(sum a_i ^ num_bytes), low_t = mix(sum b_i ^ num_bytes)    over tile t, mod 2^32
    digest = splitmix64's finalizer of the sum over t of (high_t << 32 | low_t), mod 2^64

A tile has 8192 words. Tiles are added up, so they may be hashed in any order and on any rank: here
with torch's integer operations, on a GPU with the kernel of tile_hash_triton.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_WORDS = 8192
MIX = (0x85EBCA6B, 0xC2B2AE35)
POSITION = (0x27D4EB2D, 0x165667B1)
SEED = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
_LOW = 0xFFFFFFFF
_CHUNK_TILES = 128  # hashed at a time, to bound the memory of torch's operations


def as_words(tensor: Tensor) -> Tensor:
    """Returns [num_words] int32, without a copy if contiguous and a multiple of four bytes."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(raw) % 4:
        raw = F.pad(raw, (0, -len(raw) % 4))
    return raw.view(torch.int32)


def add_tile_sum(
    words: Tensor, total: Tensor, first: int = 0, num_bytes: int | None = None
) -> None:
    """Adds the sum over the tiles of `words` ([num_words] int32) to `total` ([] int64).

    `words` are whole tiles, from word `first` on, of a tensor of `num_bytes` (None: all of it).
    """
    num_bytes = 4 * len(words) if num_bytes is None else num_bytes
    for start in range(0, len(words), _CHUNK_TILES * TILE_WORDS):
        part = words[start : start + _CHUNK_TILES * TILE_WORDS]
        total += _tile_sum(part, first + start, num_bytes)


def finish(total: int) -> str:
    """Returns the digest, 16 hex digits, of a sum over all tiles (signed or unsigned 64 bits)."""
    x = total & (1 << 64) - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * factor & (1 << 64) - 1
    return f"{x ^ (x >> 31):016x}"


def _tile_sum(words: Tensor, start: int, num_bytes: int) -> Tensor:
    """Hashes whole tiles (the last may be short) that begin at word `start`.

    Unsigned 32-bit values are held in int64; its products wrap around, but the low 32 bits hold.
    """
    index = torch.arange(start, start + len(words), device=words.device)
    value = words.to(torch.int64) & _LOW
    halves = []
    for position, seed, turn in zip(POSITION, SEED, (15, 13), strict=True):
        rotated = ((index << turn) | (index >> (32 - turn))) & _LOW
        mixed = _mix(value ^ ((index * position + seed) & _LOW) ^ rotated)
        tiles = F.pad(mixed, (0, -len(mixed) % TILE_WORDS)).view(-1, TILE_WORDS).sum(1)
        halves.append(_mix((tiles & _LOW) ^ (num_bytes & _LOW)))
    return ((halves[0] << 32) | halves[1]).sum()


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((16, MIX[0]), (13, MIX[1])):
        x = (x ^ (x >> shift)) * factor & _LOW
    return x ^ (x >> 16)
