"""Applies the tables of model/families.py to tensors: Hugging Face <-> Megatron shards.

The joins work on one rank's slices, and that is all the resharding there is: `from_hf` reads the
slices of one rank and joins them; `to_hf` splits the shards of all ranks and concatenates. Both
are pure functions; they need torch, but no process group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_async_rl.model.families import Join
from megatron_async_rl.model.shape import ModelShape, map_parameter, shard_shape

Index = tuple[slice, ...]
Read = Callable[[str, Index], Tensor]
"""(Hugging Face name, index) -> that part of the tensor; nothing else is read."""


def from_hf(name: str, read: Read, shape: ModelShape, rank: int = 0, tp: int = 1) -> Tensor:
    """Returns one tensor-parallel rank's shard of a Megatron parameter; with tp = 1 all of it.

    Rows that pad the vocabulary are zero.
    """
    mapping = map_parameter(name, shape)
    split = mapping.rule.split
    slices = []
    for hf, full in mapping.pieces:
        index = [slice(None)] * len(full)
        if split is None:
            slices.append(read(hf, tuple(index)))
            continue
        start = 0
        for size in mapping.sections(shape) or (full[split],):
            step = (shape.padded_vocab_size if mapping.in_vocabulary else size) // tp
            bounds = (start + min(r * step, size) for r in (rank, rank + 1))
            index[split] = slice(*bounds)
            slices.append(read(hf, tuple(index)))
            start += size
    joined = _join(mapping.rule.join, slices, shape)
    padding = shard_shape(name, shape, tp)[0] - joined.size(0)
    return torch.cat([joined, joined.new_zeros(padding, *joined.shape[1:])]) if padding else joined


def to_hf(name: str, shards: Sequence[Tensor], shape: ModelShape) -> list[tuple[str, Tensor]]:
    """Returns the Hugging Face tensors in a Megatron parameter.

    `shards`: those of all tensor-parallel ranks in rank order; one for a parameter that is not
    split. Padding of the vocabulary is dropped.
    """
    mapping = map_parameter(name, shape)
    per_rank = [_split(mapping.rule.join, shard, shape) for shard in shards]
    whole = [
        torch.cat(slices, mapping.rule.split or 0) if len(slices) > 1 else slices[0]
        for slices in zip(*per_rank, strict=True)
    ]
    if mapping.sections(shape):
        whole = [torch.cat(whole)]
    return [
        (hf, tensor[: full[0]]) for (hf, full), tensor in zip(mapping.pieces, whole, strict=True)
    ]


def _join(join: Join, slices: list[Tensor], shape: ModelShape) -> Tensor:
    if join == "one":
        return slices[0]
    if join == "stack":
        return torch.cat(slices)
    q, k, v = slices
    rest, (_, head, _) = k.shape[1:], _group_sizes(join, shape)
    groups = k.size(0) // head
    if join == "gated_qkv":  # [q1; gate1; q2; gate2] of a group becomes [q1; q2; gate1; gate2]
        q = q.reshape(groups, -1, 2, head, *rest).transpose(1, 2)
    grouped = [t.reshape(groups, -1, *rest) for t in (q, k, v)]
    return torch.cat(grouped, 1).reshape(-1, *rest)


def _split(join: Join, tensor: Tensor, shape: ModelShape) -> list[Tensor]:
    if join == "one":
        return [tensor]
    if join == "stack":
        return list(tensor.chunk(2))
    rest, sizes = tensor.shape[1:], _group_sizes(join, shape)
    q, k, v = tensor.reshape(-1, sum(sizes), *rest).split(sizes, 1)
    if join == "gated_qkv":
        q = q.reshape(len(q), 2, -1, sizes[1], *rest).transpose(1, 2)
    return [t.reshape(-1, *rest) for t in (q, k, v)]


def _group_sizes(join: Join, shape: ModelShape) -> list[int]:
    """Returns the rows of q, k and v in a group."""
    if join == "conv":
        assert shape.linear
        return [section // shape.linear.num_key_heads for section in shape.linear.conv_sections]
    head, per_group = shape.kv_channels, shape.num_attention_heads // shape.num_query_groups
    return [per_group * head * (2 if join == "gated_qkv" else 1), head, head]
