"""Causal attention over packed sequences: a token sees the earlier tokens of its own sequence only.

No mask over the whole pack is built. CUDA: torch's varlen_attn on the pack; from Hopper on, long
sequences go one by one to cuDNN's kernel, which is faster there (32k tokens, 32 heads, forward and
backward on an H200: 485 against 282 TFLOP/s). CPU: sequences of similar length are padded into
dense batches for scaled_dot_product_attention; padding is on the right, which causal attention
never reads, so the result is exact. Transformer Engine has its own core attention and does not use
this.

Context parallelism cuts every sequence into 2 * ranks chunks; rank r holds chunks r and
2 * ranks - 1 - r, as in Megatron and Transformer Engine, which balances the work. Keys and values
are gathered over the ranks.

Suffixes: T tokens of the pack that this rank holds, W tokens of the whole pack, K tokens of a dense
batch, L length of a sequence, H heads, G heads of key and value, D size of a head, F = D / 2.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, takewhile
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_async_rl.trainer.model.fused import rotate, rotate_one
from megatron_async_rl.trainer.model.recompute import SelectiveRecompute

MAX_PADDING = 0.15
"""Largest share of padding in a dense batch; above it another batch is opened."""
LONG = 4096
"""Sequences of at least this length are attended one by one from Hopper on."""
LONG_UNIT = 512
"""Long sequences are padded to a multiple of it: cuDNN plans each length once, for about 45 ms."""


@dataclass(frozen=True, slots=True)
class DenseBatch:
    """Sequences [N, L] made of tokens of the pack."""

    num_sequences: int
    length: int
    tokens_K: Tensor  # position of each token in the pack
    slots_K: Tensor  # position of each token in the flattened batch [N * L]


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a pack, extended for PackedAttention and the rotary embedding.

    PackedAttention takes qkv_format "packed": Megatron does not know it and then leaves query, key
    and value as [T, 1, H, D]. Transformer Engine's attention needs "thd".
    """

    positions_T: Tensor | None = None  # position of each token in its sequence
    dense: tuple[DenseBatch, ...] = ()  # for the CPU
    long: tuple[int, ...] = ()  # lengths of the leading sequences that are attended one by one
    cu_seqlens_rest: Tensor | None = None  # of the other sequences
    max_seqlen_rest: int = 0
    shard_index_T: Tensor | None = None  # context parallel: position in the whole pack
    gather_index_W: Tensor | None = None  # context parallel: position after a gather over ranks
    rotary_cos_TF: Tensor | None = None  # float32
    rotary_sin_TF: Tensor | None = None

    def shard(self, x_W: Tensor) -> Tensor:
        """Returns the rows of the tokens that this rank holds [T]."""
        return x_W if self.shard_index_T is None else x_W[self.shard_index_T]

    def gather(self, x_T: Tensor) -> Tensor:
        """Returns the rows of all tokens of the pack in order [W].

        Collective over the context-parallel ranks; differentiable.
        """
        if self.gather_index_W is None:
            return x_T
        gathered = gather_from_sequence_parallel_region(x_T, group=mpu.get_context_parallel_group())
        return gathered.index_select(0, self.gather_index_W)


def pack_sequences(
    lengths: Sequence[int],
    device: torch.device,
    *,
    thd: bool,
    dense: bool,
    cp: int = 1,
    cp_rank: int = 0,
) -> PackedSequences:
    """Returns the description of sequences of these lengths, one after another.

    thd: for Transformer Engine's attention. dense: for PackedAttention on the CPU and in float32,
    which varlen_attn refuses. With cp > 1 each length must be a multiple of 2 * cp.
    """
    sizes = torch.tensor(lengths, dtype=torch.int32)
    ends = sizes.cumsum(0, dtype=torch.int32)
    cu_seqlens = F.pad(ends, (1, 0))
    positions_T = torch.arange(int(ends[-1])) - torch.repeat_interleave(cu_seqlens[:-1], sizes)
    shard_index = gather_index = None
    if cp > 1:
        chunk_T = positions_T // torch.repeat_interleave(sizes // (2 * cp), sizes)
        holder_T = torch.minimum(chunk_T, 2 * cp - 1 - chunk_T)
        shard_index = (holder_T == cp_rank).nonzero()[:, 0]
        gather_index = torch.argsort(torch.argsort(holder_T, stable=True)).to(device)
        positions_T, shard_index = positions_T[shard_index], shard_index.to(device)
    long = []
    if (
        device.type == "cuda"
        and not (thd or dense or cp > 1)
        and torch.cuda.get_device_capability(device)[0] >= 9
    ):
        long = list(takewhile(lambda length: length >= LONG, lengths))
    return PackedSequences(
        qkv_format="thd" if thd else "packed",
        cu_seqlens_q=cu_seqlens.to(device),
        cu_seqlens_kv=cu_seqlens.to(device),
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions_T=positions_T.to(device),
        dense=_dense_batches(lengths, device) if dense and cp == 1 else (),
        long=tuple(long),
        cu_seqlens_rest=(cu_seqlens[len(long) :] - sum(long)).to(device),
        max_seqlen_rest=max(lengths[len(long) :], default=0),
        shard_index_T=shard_index,
        gather_index_W=gather_index,
    )


def _dense_batches(lengths: Sequence[int], device: torch.device) -> tuple[DenseBatch, ...]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups: list[list[int]] = []
    held = 0  # tokens in the last group
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not groups or held + lengths[n] < (1 - MAX_PADDING) * lengths[groups[-1][0]] * (
            len(groups[-1]) + 1
        ):
            groups.append([])
            held = 0
        groups[-1].append(n)
        held += lengths[n]
    batches = []
    for group in groups:
        longest = lengths[group[0]]
        tokens = [torch.arange(starts[n], starts[n] + lengths[n]) for n in group]
        slots = [
            torch.arange(row * longest, row * longest + lengths[n]) for row, n in enumerate(group)
        ]
        batches.append(
            DenseBatch(
                len(group), longest, torch.cat(tokens).to(device), torch.cat(slots).to(device)
            )
        )
    return tuple(batches)


class PackedAttention(DotProductAttention):
    """Core attention of Megatron's local layer. Has no parameters; inherits sharded_state_dict."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.context_parallel_size = 1  # DotProductAttention refuses more
        super().__init__(config, *args, **kwargs)

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
        """Returns [T, 1, H * D] from query [T, 1, H, D], key and value [T, 1, G, D]."""
        assert packed_seq_params is not None, "the trainer packs every micro-batch"
        packed, tokens = packed_seq_params, query.size(0)
        assert packed.rotary_cos_TF is not None and packed.rotary_sin_TF is not None
        rotary = (packed.rotary_cos_TF, packed.rotary_sin_TF)
        if packed.shard_index_T is None and not packed.dense:
            return _varlen(query, key, value, packed, self.softmax_scale).reshape(tokens, 1, -1)
        qkv = (*rotate(query.squeeze(1), key.squeeze(1), *rotary), value.squeeze(1))
        attend = _dense if packed.shard_index_T is None else _context_parallel
        return attend(*qkv, packed, self.softmax_scale).reshape(tokens, 1, -1)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float | None
) -> Tensor:
    """Returns [T, H, D] from query [T, 1, H, D], key and value [T, 1, G, D], not yet rotated.

    Backward recomputes rotated query and key from the inputs of their norms, where these are known
    (recompute_fn of RMSNorm's output).
    """
    from torch.nn.attention import varlen  # not in every build of torch for CPU

    grouped = query.size(2) != key.size(2)
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # causal
    if "enable_gqa" in _parameters(varlen.varlen_attn):  # older kernels accept fewer key heads
        options["enable_gqa"] = grouped
    rest = query.size(0) - sum(packed.long)
    sizes = [*packed.long, rest] if rest else list(packed.long)
    # split and cat: backward of a slice would fill a gradient of the whole pack with zeros
    parts = zip(*(x.squeeze(1).split(sizes) for x in (query, key, value.contiguous())), strict=True)
    rotary = (packed.rotary_cos_TF, packed.rotary_sin_TF)
    out, first = [], 0
    with SelectiveRecompute() as selective:
        for size, (q, k, v) in zip(sizes, parts, strict=True):
            end, finish = first + size, _padded if len(out) < len(packed.long) else _as_is
            angles = tuple(x[first:end] for x in rotary)
            qkv = [finish(x) for x in (*rotate(q, k, *angles), v)]
            for x, source in zip(qkv, (query, key), strict=False):
                if norm := getattr(source, "recompute_fn", None):
                    normed = partial(norm, first, end)
                    selective.recompute(x, partial(_norm_and_rotate, normed, *angles, finish))
            if finish is _padded:
                if qkv[2] is not v:
                    selective.recompute(qkv[2], partial(_padded, v.detach()))
                q, k, v = (x.transpose(0, 1)[None] for x in qkv)
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    attended = F.scaled_dot_product_attention(
                        q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
                    )
                out.append(attended[0].transpose(0, 1)[:size])
            else:
                cu_seqlens, longest = packed.cu_seqlens_rest, packed.max_seqlen_rest
                out.append(
                    varlen.varlen_attn(*qkv, cu_seqlens, cu_seqlens, longest, longest, **options)
                )
            first = end
        if len(out) == 1:
            return out[0]
        joined = torch.cat(out)  # the next layer keeps it
        for n, (part, rows) in enumerate(zip(out, joined.detach().split(sizes), strict=True)):
            selective.recompute(part, partial(_padded if n < len(packed.long) else _as_is, rows))
    return joined


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _norm_and_rotate(
    norm: Callable[[], Tensor], cos: Tensor, sin: Tensor, finish: Callable[[Tensor], Tensor]
) -> Tensor:
    return finish(rotate_one(norm().squeeze(1), cos, sin))


def _as_is(x: Tensor) -> Tensor:
    return x


def _padded(x_LHD: Tensor) -> Tensor:
    """Returns x with zeros appended up to a multiple of LONG_UNIT tokens."""
    padding = -x_LHD.size(0) % LONG_UNIT
    return F.pad(x_LHD, (0, 0, 0, 0, 0, padding)) if padding else x_LHD


def _dense(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    packed: PackedSequences,
    scale: float | None,
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
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
        out = out.transpose(1, 2).flatten(0, 1)
        outputs.append(_Move.apply(out, batch.slots_K, batch.tokens_K, total))
    return outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)


def _context_parallel(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    packed: PackedSequences,
    scale: float | None,
) -> Tensor:
    """Attends from this rank's queries to all ranks' keys and values, with one call per chunk.

    Written for the CPU: on GPUs context parallelism uses Transformer Engine.
    """
    group = mpu.get_context_parallel_group()
    ranks, rank, groups = group.size(), group.rank(), key_TGD.size(1)
    key, value = packed.gather(torch.cat([key_TGD, value_TGD], 1)).split(groups, 1)
    out, first = [], 0
    cu_seqlens = packed.cu_seqlens_q.tolist()
    for start, end in pairwise(cu_seqlens):
        length = (end - start) // (2 * ranks)
        for chunk in (rank, 2 * ranks - 1 - rank):
            seen = (chunk + 1) * length  # keys up to the chunk's own end
            mask = torch.ones(length, seen, dtype=torch.bool, device=query_THD.device)
            mask = mask.tril(seen - length)
            q = query_THD[first : first + length]
            k, v = key[start : start + seen], value[start : start + seen]
            attended = F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q, k, v)),
                attn_mask=mask,
                scale=scale,
                enable_gqa=q.size(1) != groups,
            )
            out.append(attended[0].transpose(0, 1))
            first += length
    return torch.cat(out)


class _Move(torch.autograd.Function):
    """Moves rows `source_K` of a tensor to rows `target_K` of a zero tensor of `size` rows.

    Neither list repeats a row, so backward moves the gradient back. Backward of plain indexing
    would add rows up, which is many times slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source_K: Tensor, target_K: Tensor, size: int) -> Tensor:
        ctx.rows = (source_K, target_K, x.size(0))
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, target_K, x.index_select(0, source_K))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source_K, target_K, size = ctx.rows
        moved = grad.new_zeros(size, *grad.shape[1:]).index_copy_(
            0, source_K, grad.index_select(0, target_K)
        )
        return moved, None, None, None
