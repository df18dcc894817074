"""The trainer's core attention against Transformer Engine's on the same packs: forward and backward on one Hopper GPU.

    python tools/bench/bench_attention.py            # needs a GPU and Transformer Engine

Qwen3-8B's heads (32 of 128, 8 of keys and values), bfloat16, packs of 32768 tokens. Ours includes the rotary embedding,
theirs does not. FLOPs are those of causal attention, 6 * length^2 * heads * head size a sequence.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

import torch
from torch import Tensor

from megatron_async_rl.trainer.model.attention import _varlen, pack_sequences

HEADS, GROUPS, SIZE = 32, 8, 128
PACKS = ([32768], [16384] * 2, [9300, 8100, 5200, 4400, 2600, 1700, 900, 568], [2048] * 16)


def seconds(call: Callable[[], None], count: int = 6) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def compare(lengths: list[int]) -> str:
    from transformer_engine.pytorch import DotProductAttention

    total, longest = sum(lengths), max(lengths)
    q, k, v = (
        torch.randn(total, heads, SIZE, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )
    gradient = torch.randn(total, HEADS * SIZE, device="cuda", dtype=torch.bfloat16)
    packed = pack_sequences(lengths, torch.device("cuda", 0), thd=False, dense=False)
    packed.rotary_cos_TF = torch.ones(
        total, SIZE // 2, device="cuda"
    )  # by no angle: both compute the same
    packed.rotary_sin_TF = torch.zeros(total, SIZE // 2, device="cuda")
    attention = DotProductAttention(
        HEADS, SIZE, num_gqa_groups=GROUPS, attn_mask_type="padding_causal", qkv_format="thd"
    )

    def ours() -> Tensor:
        return _varlen(q[:, None], k[:, None], v[:, None], packed, None).reshape(total, -1)

    def theirs() -> Tensor:
        borders = packed.cu_seqlens_q
        return attention(
            q,
            k,
            v,
            cu_seqlens_q=borders,
            cu_seqlens_kv=borders,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    with torch.no_grad():
        difference = (ours() - theirs()).abs().max().item()
    flops = 6 * HEADS * SIZE * sum(n * n for n in lengths)
    cells = [str(len(lengths)), str(longest)]
    for call in (ours, theirs):
        took = seconds(lambda call=call: call().backward(gradient))
        cells += [f"{1e3 * took:.2f}", f"{flops / took / 1e12:.0f}"]
    return "| " + " | ".join([*cells, f"{difference:.2g}"]) + " |"


def main() -> None:
    print(
        "| sequences | longest | ours ms | TFLOP/s | Transformer Engine ms | TFLOP/s | largest difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for lengths in PACKS:
        print(compare(lengths), flush=True)


if __name__ == "__main__":
    sys.exit(main())
