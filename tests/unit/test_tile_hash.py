"""The digest of an engine on a GPU against the same arithmetic in Python, word by word."""

from __future__ import annotations

import pytest
import torch

from megatron_async_rl.model.families import FAMILIES
from megatron_async_rl.model.shape import ModelShape
from megatron_async_rl.weights import tile_hash
from megatron_async_rl.weights.digest import EngineDigests

LOW = 0xFFFFFFFF


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x85EBCA6B & LOW
    x = (x ^ x >> 13) * 0xC2B2AE35 & LOW
    return x ^ x >> 16


def reference(raw: bytes) -> str:
    raw += bytes(-len(raw) % 4)
    words = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
    seeds = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & LOW)
    total = 0
    for start in range(0, len(words), 8192):
        sums = [0, 0]
        for index, word in enumerate(words[start : start + 8192], start):
            for half, (factor, turn) in enumerate(((0x27D4EB2D, 15), (0x165667B1, 13))):
                turned = (index << turn | index >> 32 - turn) & LOW
                sums[half] += mix(word ^ (index * factor + seeds[half] & LOW) ^ turned)
        high, low = (mix((part & LOW) ^ (len(raw) & LOW)) for part in sums)
        total += high << 32 | low
    x = total & (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return f"{x ^ x >> 31:016x}"


def digest(tensor: torch.Tensor) -> str:
    total = torch.zeros((), dtype=torch.int64)
    tile_hash.add_tile_sum(tile_hash.as_words(tensor), total)
    return tile_hash.finish(int(total))


@pytest.mark.parametrize("num", [1, 2, 7, 8192 * 2, 8192 * 2 + 1, 50001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_digest_equals_the_reference(num: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(num, generator=torch.Generator().manual_seed(num)).to(dtype)
    assert digest(tensor) == reference(tensor.view(torch.uint8).numpy().tobytes())


def test_flipped_bit_or_swapped_words_change_the_digest() -> None:
    tensor = torch.randn(30000, generator=torch.Generator().manual_seed(0))
    flipped, swapped = tensor.clone(), tensor.clone()
    flipped.view(torch.int32)[20000] ^= 1
    swapped[[3, 9000]] = tensor[[9000, 3]]
    assert len({digest(t) for t in (tensor, flipped, swapped)}) == 3


def test_expert_digests_in_any_order_sum_to_the_layer_digest() -> None:
    shape = ModelShape(
        family=FAMILIES[3], num_layers=1, hidden_size=128, ffn_hidden_size=128,
        num_attention_heads=2, num_query_groups=2, kv_channels=16, vocab_size=8,
        padded_vocab_size=8, tied=True, num_experts=3, expert_ffn_hidden_size=128,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    experts = {
        (e, leaf): torch.randn(128, 128, generator=generator)  # two full tiles each
        for e in range(3)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    digests = EngineDigests(shape, 1, "tiles")
    for e, leaf in reversed(experts):
        digests.add(f"model.layers.0.mlp.experts.{e}.{leaf}.weight", experts[e, leaf])
    w13 = torch.cat([experts[e, leaf] for e in range(3) for leaf in ("gate_proj", "up_proj")])
    w2 = torch.cat([experts[e, "down_proj"] for e in range(3)])
    at = "0:model.layers.0.mlp.experts"
    assert digests.result() == {f"{at}.w13_weight": digest(w13), f"{at}.w2_weight": digest(w2)}
