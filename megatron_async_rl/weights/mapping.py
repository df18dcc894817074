"""Applies the tables of model/families.py to tensors: Hugging Face <-> Megatron shards.

The joins work on one rank's slices, and that is all the resharding there is: `from_hf` reads the
slices of one rank and joins them; `to_hf` splits the shards of all ranks and concatenates. Both
are pure functions; they need torch, but no process group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_async_rl.model.families import Join, ModelShape, map_parameter, shard_shape

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
        if split is not None:
            size = full[split]
            step = (shape.padded_vocab_size if mapping.in_vocabulary else size) // tp
            index[split] = slice(min(rank * step, size), min((rank + 1) * step, size))
        slices.append(read(hf, tuple(index)))
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
    out = []
    for (hf, full), slices in zip(mapping.pieces, zip(*per_rank, strict=True), strict=True):
        tensor = torch.cat(slices, mapping.rule.split or 0) if len(slices) > 1 else slices[0]
        out.append((hf, tensor[: full[0]]))
    return out


def _join(join: Join, slices: list[Tensor], shape: ModelShape) -> Tensor:
    if join == "one":
        return slices[0]
    if join == "stack":
        return torch.cat(slices)
    q, k, v = slices
    groups = k.size(0) // shape.kv_channels
    grouped = [t.reshape(groups, -1, *t.shape[1:]) for t in (q, k, v)]
    return torch.cat(grouped, 1).reshape(-1, *q.shape[1:])


def _split(join: Join, tensor: Tensor, shape: ModelShape) -> list[Tensor]:
    if join == "one":
        return [tensor]
    if join == "stack":
        return list(tensor.chunk(2))
    head, per_group = shape.kv_channels, shape.num_attention_heads // shape.num_query_groups
    grouped = tensor.reshape(-1, (per_group + 2) * head, *tensor.shape[1:])
    return [
        t.reshape(-1, *tensor.shape[1:]) for t in grouped.split([per_group * head, head, head], 1)
    ]
