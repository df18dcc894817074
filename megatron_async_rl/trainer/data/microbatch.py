"""This data-parallel rank's samples as packed micro-batches under a token budget.

Every data-parallel rank ends with the same number of minibatches and, in each, of micro-batches, because every
micro-batch has collectives in it. A rank short of samples runs micro-batches of padding.

Suffix T: tokens of one micro-batch, padding included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_async_rl.protocol.types import NOT_GENERATED, TrainSample
from megatron_async_rl.trainer.algorithms.importance import Owners
from megatron_async_rl.trainer.data.packing import agree_on_bins, allocate, allocate_even, cost
from megatron_async_rl.trainer.model.attention import PackedSequences, pack_sequences
from megatron_async_rl.trainer.parallel import context_parallel_sum


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Samples one after another, then padding as a sequence of its own; under context parallelism, this rank's chunks.

    All but ids_T is aligned at the position that *predicts* a token: entry t is about token t + 1 of the same sample.
    """

    ids_T: Tensor  # int64
    targets_T: Tensor  # int64; 0 where there is no next token
    mask_T: Tensor  # bool: the next token was generated, so it is trained on
    behavior_T: Tensor  # float32
    advantages_T: Tensor  # float32
    lag_T: Tensor  # int32: versions between the one that generated the next token and the one now trained
    sequences: PackedSequences
    owners: Owners  # whose sums are over all ranks that hold chunks
    num_tokens: int  # of the whole pack, without padding
    cost: float  # FLOPs of the whole pack, in those of one token without attention
    proximal_T: Tensor | None = (
        None  # float32, set by the proximal pass; on the last pipeline stage only
    )
    moved: bool = (
        False  # without it: earlier minibatches have moved the weights that train this one
    )
    trusted_T: Tensor | None = None  # bool, with m2_threshold; likewise
    reference_T: Tensor | None = None  # float32, by the reference pass; likewise
    values_T: Tensor | None = (
        None  # float32, the critic's before the step: what the sample will earn from here; likewise
    )
    returns_T: Tensor | None = None  # float32, what it is taught


@dataclass(frozen=True, slots=True)
class Packing:
    """How this rank packs; the same on every rank."""

    budget: int
    """Tokens of a micro-batch: trainer.max_tokens_per_microbatch."""
    tp: int
    """The padded length of a pack is a multiple of it, for sequence parallelism."""
    device: torch.device
    thd: bool
    """Transformer Engine's attention is used."""
    dense: bool
    """Sequences are padded into dense batches for attention."""
    cp: int = 1
    cp_rank: int = 0
    divisor: int = 1
    """The number of micro-batches is a multiple of it, for interleaved pipelines."""
    even: bool = False
    """Bins are balanced by cost; False: first fit decreasing."""
    attention_length: float = math.inf
    """Of the cost: see packing.py."""

    @property
    def unit(self) -> int:
        """Every sequence is padded to a multiple of it."""
        return 2 * self.cp if self.cp > 1 else 1

    def padded(self, length: int) -> int:
        return -(-length // self.unit) * self.unit


def cut_minibatches(
    samples: Sequence[TrainSample],
    count: int,
    version: int,
    packing: Packing,
    group: dist.ProcessGroup,
    seed: int,
) -> list[list[Microbatch]]:
    """The share's micro-batches, by minibatch: `count` parts of equal numbers of samples after a seeded shuffle."""
    order = (
        np.random.default_rng((seed, version)).permutation(len(samples))
        if count > 1
        else np.arange(len(samples))
    )
    method = allocate
    if packing.even:
        method = partial(allocate_even, attention_length=packing.attention_length)
    minibatches = []
    for part in np.array_split(order, count):
        chosen = [samples[n] for n in part]
        lengths = [packing.padded(len(s.ids)) for s in chosen]
        bins = agree_on_bins(
            lengths, packing.budget, group, packing.device, packing.divisor, method
        )
        minibatches.append([pack([chosen[n] for n in bin_], version, packing) for bin_ in bins])
    return minibatches


def pack(samples: Sequence[TrainSample], version: int, packing: Packing) -> Microbatch:
    lengths = [packing.padded(len(s.ids)) for s in samples]
    multiple = packing.unit * packing.tp
    padding = -sum(lengths) % multiple or (0 if samples else multiple)
    if padding:
        lengths.append(padding)
    sequences = pack_sequences(
        lengths,
        packing.device,
        thd=packing.thd,
        dense=packing.dense,
        cp=packing.cp,
        cp_rank=packing.cp_rank,
    )

    def joined(arrays: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        padded = [
            np.pad(a, (0, length - len(a))) for a, length in zip(arrays, lengths, strict=False)
        ]
        flat = torch.from_numpy(np.concatenate([*padded, np.zeros(padding, bool)])).to(
            packing.device, dtype
        )
        return sequences.own(flat)

    def next_of(array: np.ndarray, last: float = 0) -> np.ndarray:
        """Entry t + 1 at t."""
        return np.append(array[1:], array.dtype.type(last))

    of_token = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(packing.device)
    owners = Owners(sequences.own(of_token), len(lengths))
    if packing.cp > 1:
        owners = replace(owners, total=context_parallel_sum)
    generated = [next_of(s.versions, NOT_GENERATED) for s in samples]
    mask_T = joined([g != NOT_GENERATED for g in generated], torch.bool)
    return Microbatch(
        ids_T=joined([s.ids for s in samples], torch.int64),
        targets_T=joined([next_of(s.ids) for s in samples], torch.int64),
        mask_T=mask_T,
        behavior_T=joined([next_of(s.logprobs) for s in samples], torch.float32),
        advantages_T=joined([next_of(s.advantages) for s in samples], torch.float32),
        lag_T=joined([version - g for g in generated], torch.int32),
        sequences=sequences,
        owners=owners,
        num_tokens=sum(len(s.ids) for s in samples),
        cost=sum(cost(len(s.ids), packing.attention_length) for s in samples),
    )


def whole(microbatch: Microbatch) -> Microbatch:
    """With what every context-parallel rank knows of its tokens, for all tokens of the pack, in order; collective over them.

    For what a sum over a sample does not tell. To be computed with, not run; `sequences.own` cuts the results again.
    """
    sequences, owners = microbatch.sequences, microbatch.owners
    if sequences.kept_T is None:
        return microbatch
    known = {
        f.name: getattr(microbatch, f.name) for f in fields(microbatch) if f.name.endswith("_T")
    }
    gathered = {name: sequences.whole(x_T) for name, x_T in known.items() if x_T is not None}
    return replace(
        microbatch, owners=Owners(sequences.whole(owners.sample_T), owners.count), **gathered
    )
