"""Compares the trainer's core attention with Transformer Engine's, on one Hopper GPU.

    python tools/bench/bench_attention.py            # needs a GPU and Transformer Engine

Forward and backward over the same packs of 32768 tokens in bfloat16, with the heads of Qwen3-8B (32
query heads and 8 key-value heads of 128). The trainer's time includes the rotary embedding, the
other does not. FLOPs are those of causal attention: 6 * length^2 * heads * head size per sequence.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

import torch
from torch import Tensor

from megatron_async_rl.trainer.model.attention import _varlen
from megatron_async_rl.trainer.model.sequences import pack_sequences

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
    # rotation by zero, so that both compute the same
    packed.rotary_cos_TF = torch.ones(total, SIZE // 2, device="cuda")
    packed.rotary_sin_TF = torch.zeros(total, SIZE // 2, device="cuda")
    attention = DotProductAttention(
        HEADS, SIZE, num_gqa_groups=GROUPS, attn_mask_type="padding_causal", qkv_format="thd"
    )

    def trainer_attention() -> Tensor:
        out = _varlen(q[:, None], k[:, None], v[:, None], packed, packed.rotary, None)
        return out.reshape(total, -1)

    def transformer_engine_attention() -> Tensor:
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
        difference = (trainer_attention() - transformer_engine_attention()).abs().max().item()
    flops = 6 * HEADS * SIZE * sum(n * n for n in lengths)
    cells = [str(len(lengths)), str(longest)]
    for call in (trainer_attention, transformer_engine_attention):
        took = seconds(lambda call=call: call().backward(gradient))
        cells += [f"{1e3 * took:.2f}", f"{flops / took / 1e12:.0f}"]
    return "| " + " | ".join([*cells, f"{difference:.2g}"]) + " |"


def main() -> None:
    print(
        "| sequences | longest | trainer ms | TFLOP/s "
        "| Transformer Engine ms | TFLOP/s | largest difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for lengths in PACKS:
        print(compare(lengths), flush=True)


if __name__ == "__main__":
    sys.exit(main())
