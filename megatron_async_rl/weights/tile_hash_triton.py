"""tile_hash.add_tile_sum on a GPU: one program and one atomic addition per tile."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_async_rl.weights.tile_hash import MIX, POSITION, SEED, TILE_WORDS

_BLOCK = 1024


@triton.jit
def _mix(x, FIRST: tl.constexpr, SECOND: tl.constexpr):
    x ^= x >> 16
    x *= tl.full((), FIRST, tl.uint32)
    x ^= x >> 13
    x *= tl.full((), SECOND, tl.uint32)
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["num_words", "first", "num_bytes"])
def _add_tile(
    words, total, num_words, first, num_bytes,
    SEED_A: tl.constexpr, SEED_B: tl.constexpr, POSITION_A: tl.constexpr, POSITION_B: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(0).to(tl.int64) * TILE
    sum_a = tl.zeros((BLOCK,), tl.uint32)
    sum_b = tl.zeros((BLOCK,), tl.uint32)
    for offset in tl.static_range(0, TILE, BLOCK):
        position = base + offset + tl.arange(0, BLOCK)
        inside = position < num_words
        value = tl.load(words + position, mask=inside, other=0).to(tl.uint32, bitcast=True)
        index = (first + position).to(tl.uint32)
        a = index * tl.full((), POSITION_A, tl.uint32) + tl.full((), SEED_A, tl.uint32)
        b = index * tl.full((), POSITION_B, tl.uint32) + tl.full((), SEED_B, tl.uint32)
        a = _mix(value ^ a ^ ((index << 15) | (index >> 17)), FIRST, SECOND)
        b = _mix(value ^ b ^ ((index << 13) | (index >> 19)), FIRST, SECOND)
        sum_a += tl.where(inside, a, tl.zeros_like(a))
        sum_b += tl.where(inside, b, tl.zeros_like(b))
    size = num_bytes.to(tl.uint32)
    high = _mix(tl.sum(sum_a, 0).to(tl.uint32) ^ size, FIRST, SECOND).to(tl.uint64)
    low = _mix(tl.sum(sum_b, 0).to(tl.uint32) ^ size, FIRST, SECOND).to(tl.uint64)
    tl.atomic_add(total, ((high << 32) | low).to(tl.int64, bitcast=True))


def add_tile_sum(words: Tensor, total: Tensor, first: int, num_bytes: int) -> None:
    """Adds the tile sum of `words` ([num_words] int32) to `total` ([] int64), on the same GPU."""
    num_words = len(words)
    _add_tile[(triton.cdiv(num_words, TILE_WORDS),)](
        words, total, num_words, first, num_bytes,
        SEED_A=SEED[0], SEED_B=SEED[1], POSITION_A=POSITION[0], POSITION_B=POSITION[1],
        FIRST=MIX[0], SECOND=MIX[1], TILE=TILE_WORDS, BLOCK=_BLOCK,
    )  # fmt: skip
