"""Causal attention over packed sequences: a token sees the earlier tokens of its own sequence only.

No mask over the whole pack is built. CUDA: torch's varlen_attn on the pack; from Hopper on, long
sequences go one by one to cuDNN's kernel, which is faster there (32k tokens, 32 heads, forward and
backward on an H200: 485 against 282 TFLOP/s). CPU: sequences of similar length are padded into
dense batches for scaled_dot_product_attention; padding is on the right, which causal attention
never reads, so the result is exact. Transformer Engine has its own core attention and does not use
this.

With context parallelism, keys and values are gathered over the ranks (see sequences.py for the
chunks that a rank holds).

Suffixes: T tokens of the pack that this rank holds, K tokens of a dense batch, L length of a
sequence, H heads, G heads of key and value, D size of a head.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_async_rl.trainer.model.fused import rotate, rotate_one
from megatron_async_rl.trainer.model.recompute import SelectiveRecompute
from megatron_async_rl.trainer.model.sequences import PackedSequences

Angles = tuple[Tensor, Tensor]  # cosines and sines [T, half the size of a head]
LONG_UNIT = 512
"""Long sequences are padded to a multiple of it: cuDNN plans each length once, for about 45 ms."""
LONG_HEAD = 128
"""Largest head that cuDNN's kernel was tried with; larger ones are attended with the rest."""


class PackedAttention(DotProductAttention):
    """Core attention of Megatron's local layer. Has no parameters; inherits sharded_state_dict."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
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
        """Returns [T, 1, H * D] from query [T, 1, H, D], key and value [T, 1, G, D].

        Latent attention (latent_attention.py) has rotated query and key, and its values may have
        smaller heads: they are padded with zeros, and the result is cut to their size.
        """
        assert packed_seq_params is not None, "the trainer packs every micro-batch"
        packed, tokens, size = packed_seq_params, query.size(0), value.size(-1)
        angles = None if self.config.multi_latent_attention else packed.rotary
        if size < query.size(-1):
            value = F.pad(value, (0, query.size(-1) - size))
        if packed.shard_index_T is None and not packed.dense:
            out = _varlen(query, key, value, packed, angles, self.softmax_scale)
        else:
            qkv = (*_rotated(query[:, 0], key[:, 0], angles), value[:, 0])
            attend = _dense if packed.shard_index_T is None else _context_parallel
            out = attend(*qkv, packed, self.softmax_scale)
        return out[..., :size].reshape(tokens, 1, -1)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSequences,
    angles: Angles | None,
    scale: float | None,
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
    long, cu_seqlens, longest = packed.long, packed.cu_seqlens_rest, packed.max_seqlen_rest
    if query.size(-1) > LONG_HEAD:
        long, cu_seqlens, longest = (), packed.cu_seqlens_q, packed.max_seqlen_q
    rest = query.size(0) - sum(long)
    sizes = [*long, rest] if rest else list(long)
    # split and cat: backward of a slice would fill a gradient of the whole pack with zeros
    parts = zip(*(x.squeeze(1).split(sizes) for x in (query, key, value.contiguous())), strict=True)
    out: list[Tensor] = []
    first = 0
    with SelectiveRecompute() as selective:
        for size, (q, k, v) in zip(sizes, parts, strict=True):
            end, finish = first + size, _padded if len(out) < len(long) else _as_is
            local = (angles[0][first:end], angles[1][first:end]) if angles else None
            qkv = [finish(x) for x in (*_rotated(q, k, local), v)]
            for x, source in zip(qkv, (query, key), strict=False):
                if local and (norm := getattr(source, "recompute_fn", None)):
                    normed = partial(norm, first, end)
                    selective.recompute(x, partial(_norm_and_rotate, normed, finish, *local))
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
                out.append(
                    varlen.varlen_attn(*qkv, cu_seqlens, cu_seqlens, longest, longest, **options)
                )
            first = end
        if len(out) == 1:
            return out[0]
        joined = torch.cat(out)  # the next layer keeps it
        for n, (part, rows) in enumerate(zip(out, joined.detach().split(sizes), strict=True)):
            selective.recompute(part, partial(_padded if n < len(long) else _as_is, rows))
    return joined


def _rotated(query: Tensor, key: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor]:
    """Returns query and key, rotated unless they are so already."""
    return rotate(query, key, *angles) if angles else (query, key)


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _norm_and_rotate(
    norm: Callable[[], Tensor], finish: Callable[[Tensor], Tensor], cos: Tensor, sin: Tensor
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
            move_rows(x, batch.tokens_K, batch.slots_K, batch.num_sequences * batch.length)
            .view(batch.num_sequences, batch.length, x.size(1), x.size(2))
            .transpose(1, 2)
            for x in (query_THD, key_TGD, value_TGD)
        )
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
        out = out.transpose(1, 2).flatten(0, 1)
        outputs.append(move_rows(out, batch.slots_K, batch.tokens_K, total))
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
            queries, keys = slice(first, first + length), slice(start, start + seen)
            q, k, v = (
                x.transpose(0, 1)[None] for x in (query_THD[queries], key[keys], value[keys])
            )
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.size(1) != groups
            )
            out.append(attended[0].transpose(0, 1))
            first += length
    return torch.cat(out)


def move_rows(x: Tensor, source_K: Tensor, target_K: Tensor, size: int) -> Tensor:
    """Moves rows `source_K` of a tensor to rows `target_K` of a zero tensor of `size` rows.

    Neither list repeats a row, so backward moves the gradient back. Backward of plain indexing
    would add rows up, which is many times slower.
    """
    return _Move.apply(x, source_K, target_K, size)


class _Move(torch.autograd.Function):
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
