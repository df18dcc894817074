"""The description of a pack of sequences, which accompanies its tokens through the model.

Context parallelism cuts every sequence into 2 * ranks chunks; rank r holds chunks r and 2 * ranks -
1 - r, as in Megatron and Transformer Engine. This balances the work of causal attention.

Suffixes: T tokens of the pack that this rank holds, W tokens of the whole pack, K tokens of a dense
batch, F half the size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

MAX_PADDING = 0.15
"""Largest share of padding in a dense batch; above it another batch is opened."""
LONG = 4096
"""Sequences of at least this length are attended one by one from Hopper on."""


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

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary angles [T, F], both set by PackedRotaryEmbedding."""
        assert self.rotary_cos_TF is not None and self.rotary_sin_TF is not None
        return self.rotary_cos_TF, self.rotary_sin_TF

    @cached_property
    def whole_sequences(self) -> tuple[DenseBatch, ...]:
        """Dense batches of all tokens of the pack, on every kind of device."""
        lengths = self.cu_seqlens_q.diff().tolist()
        return self.dense or _dense_batches(lengths, self.cu_seqlens_q.device)

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
