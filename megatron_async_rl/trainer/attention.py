"""Attention over packed sequences: every token sees the tokens before it in its own sequence, and no others.

No mask over the whole pack is ever made. CUDA: torch's varlen_attn on the pack as it is. CPU: sequences of like length
are padded into dense batches for scaled_dot_product_attention; padding is on the right, where causal attention never
looks, so it is exact. (Transformer Engine has its own core attention and does not come here.)

Suffixes: T tokens of the pack, N sequences of a dense batch, L their length, H heads, D size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

MAX_PADDING = 0.15
"""Share of a dense batch that may be padding; above it another batch is opened."""


@dataclass(frozen=True, slots=True)
class DenseBatch:
    """Sequences [N, L] made of tokens of the pack."""

    num_sequences: int
    length: int
    tokens_K: Tensor  # where in the pack the K tokens are
    slots_K: Tensor  # and where in the flattened [N * L] batch


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a pack, with what our attention and rotary embedding need beside it.

    For our own core attention qkv_format is "packed", which Megatron does not know: it then leaves query, key and value
    as [T, 1, H, D], and takes the rotary angles as they come. Transformer Engine's attention needs "thd".
    """

    positions_T: Tensor | None = None  # position of each token in its sequence
    dense: tuple[DenseBatch, ...] = ()  # for the CPU


def pack_sequences(lengths: Sequence[int], device: torch.device, *, thd: bool, dense: bool) -> PackedSequences:
    """The description of sequences of these lengths, one after another.

    thd: for Transformer Engine's attention. dense: for ours on the CPU, and for float32, which varlen_attn refuses.
    """
    sizes = torch.tensor(lengths, dtype=torch.int32)
    ends = sizes.cumsum(0, dtype=torch.int32)
    cu_seqlens = F.pad(ends, (1, 0))
    positions_T = torch.arange(int(ends[-1])) - torch.repeat_interleave(cu_seqlens[:-1], sizes)
    return PackedSequences(
        qkv_format="thd" if thd else "packed",
        cu_seqlens_q=cu_seqlens.to(device),
        cu_seqlens_kv=cu_seqlens.to(device),
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions_T=positions_T.to(device),
        dense=_dense_batches(lengths, device) if dense else (),
    )


def _dense_batches(lengths: Sequence[int], device: torch.device) -> tuple[DenseBatch, ...]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups: list[list[int]] = []
    held = 0  # tokens in the last group
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not groups or held + lengths[n] < (1 - MAX_PADDING) * lengths[groups[-1][0]] * (len(groups[-1]) + 1):
            groups.append([])
            held = 0
        groups[-1].append(n)
        held += lengths[n]
    batches = []
    for group in groups:
        longest = lengths[group[0]]
        tokens = [torch.arange(starts[n], starts[n] + lengths[n]) for n in group]
        slots = [torch.arange(row * longest, row * longest + lengths[n]) for row, n in enumerate(group)]
        batches.append(DenseBatch(len(group), longest, torch.cat(tokens).to(device), torch.cat(slots).to(device)))
    return tuple(batches)


class PackedAttention(DotProductAttention):
    """Core attention of Megatron's local layer. Inherits construction and sharded_state_dict; has no parameters."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [T, 1, H, D], key and value [T, 1, groups, D] -> [T, 1, H * D]"""
        assert packed_seq_params is not None, "the trainer packs every micro-batch"
        qkv = (query.squeeze(1), key.squeeze(1), value.squeeze(1))
        attend = _dense if packed_seq_params.dense else _varlen
        return attend(*qkv, packed_seq_params, self.softmax_scale).reshape(query.size(0), 1, -1)


def _varlen(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packed: PackedSequences, scale: float | None
) -> Tensor:
    from torch.nn.attention import varlen  # not in every build of torch for CPU

    per_group = query_THD.size(1) // key_TGD.size(1)
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # all before, none after: causal
    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
        options["enable_gqa"] = per_group > 1
    elif per_group > 1:
        key_TGD, value_TGD = (x.repeat_interleave(per_group, dim=1) for x in (key_TGD, value_TGD))
    cu_seqlens, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    return varlen.varlen_attn(query_THD, key_TGD, value_TGD, cu_seqlens, cu_seqlens, longest, longest, **options)


def _dense(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packed: PackedSequences, scale: float | None
) -> Tensor:
    total = query_THD.size(0)
    outputs = []
    for batch in packed.dense:
        q, k, v = (
            _Move.apply(x, batch.tokens_K, batch.slots_K, batch.num_sequences * batch.length)
            .view(batch.num_sequences, batch.length, x.size(1), x.size(2))
            .transpose(1, 2)
            for x in (query_THD, key_TGD, value_TGD)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
        out = out.transpose(1, 2).flatten(0, 1)
        outputs.append(_Move.apply(out, batch.slots_K, batch.tokens_K, total))
    return outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)


class _Move(torch.autograd.Function):
    """Rows `source_K` of a tensor become rows `target_K` of a zero tensor of `size` rows; both lists name a row once.

    Backward is the same move the other way; plain indexing would add up instead, many times slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source_K: Tensor, target_K: Tensor, size: int) -> Tensor:
        ctx.rows = (source_K, target_K, x.size(0))
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, target_K, x.index_select(0, source_K))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source_K, target_K, size = ctx.rows
        moved = grad.new_zeros(size, *grad.shape[1:]).index_copy_(0, source_K, grad.index_select(0, target_K))
        return moved, None, None, None
