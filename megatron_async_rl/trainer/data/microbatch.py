"""Packs this data-parallel rank's samples into micro-batches under a token budget.

All data-parallel ranks get the same number of minibatches and, in each, of micro-batches, because
every micro-batch has collectives in it. A rank with too few samples runs micro-batches of padding.

Suffix T: tokens of one micro-batch that this rank holds, padding included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import DataError
from megatron_async_rl.model.routing import Routing
from megatron_async_rl.protocol.types import NOT_GENERATED, TrainSample
from megatron_async_rl.trainer.data import packing as bins
from megatron_async_rl.trainer.data.sample_index import SampleIndex
from megatron_async_rl.trainer.model import layers
from megatron_async_rl.trainer.model.build import TrainerModel
from megatron_async_rl.trainer.model.sequences import PackedSequences, pack_sequences
from megatron_async_rl.trainer.parallel import context_parallel_sum


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Samples one after another, then padding as one more sequence.

    With context parallelism: this rank's chunks of them. All tensors but ids_T are aligned with the
    position that predicts a token: entry t describes token t + 1 of the same sample. The fields
    with a default are added before the step, on the last pipeline stage only.
    """

    ids_T: Tensor  # int64
    targets_T: Tensor  # int64; 0 where there is no next token
    mask_T: Tensor  # bool: the next token was generated, so it is trained on
    behavior_T: Tensor  # float32
    advantages_T: Tensor  # float32
    staleness_T: Tensor  # int32: versions from the one that generated the token to this step's
    sequences: PackedSequences
    sample_index: SampleIndex  # its sums include all context-parallel ranks
    num_tokens: int  # of the whole pack, without padding
    cost: float  # FLOPs of the whole pack, in units of one token without attention
    proximal_T: Tensor | None = None  # float32
    proximal_missing: bool = False
    """No proximal_T, and earlier minibatches of this step have changed the weights."""
    m2_mask_T: Tensor | None = None  # bool: tokens that M2PO keeps
    reference_T: Tensor | None = None  # float32
    probe_T: Tensor | None = None  # int32: 1 + place in the mismatch probe, 0 if not part of it
    values_T: Tensor | None = None  # float32: the critic's prediction before this step
    returns_T: Tensor | None = None  # float32: the critic's target
    experts_TLK: Tensor | None = None
    """Experts to replay at each position, [T, layers, top_k] uint8 or int16 on the CPU; a position
    or layer with one expert several times has none."""

    def gather_context_parallel(self) -> Microbatch:
        """Returns the micro-batch with the tensors of the whole pack; collective over CP ranks.

        For calculations in which the order of a sample's tokens matters. The result cannot be run;
        `sequences.shard` cuts tensors of it back to this rank's tokens.
        """
        if self.sequences.shard_index_T is None:
            return self
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_T")}
        gathered: dict[str, Any] = {
            name: self.sequences.gather(x_T) for name, x_T in tensors.items() if x_T is not None
        }
        sample_T = self.sequences.gather(self.sample_index.sample_T)
        index = SampleIndex(sample_T, self.sample_index.num_samples)
        return replace(self, sample_index=index, **gathered)


Minibatches = list[list[Microbatch]]


@dataclass(frozen=True, slots=True)
class Packing:
    """How this rank packs samples; the same on every rank."""

    budget: int
    """Tokens of a micro-batch: trainer.max_tokens_per_microbatch."""
    tp: int
    """The padded length of a pack is a multiple of it, for sequence parallelism."""
    device: torch.device
    thd: bool
    """For Transformer Engine's attention."""
    dense: bool
    """Sequences are padded into dense batches for attention."""
    cp: int = 1
    cp_rank: int = 0
    count_multiple: int = 1
    """The number of micro-batches is a multiple of it, for interleaved pipelines."""
    balanced: bool = False
    """Micro-batches have equal cost (Karmarkar-Karp); False: first fit decreasing."""
    attention_length: float = math.inf
    """Parameter of the cost: see packing.py."""
    routing: Routing | None = None
    """With rollout.routing_replay."""

    @classmethod
    def of(cls, model: TrainerModel, config: Config) -> Packing:
        """Returns the packing for this model and its parallel layout."""
        te = layers.has_transformer_engine()
        fp32 = model.config.params_dtype == torch.float32
        multiple = model.config.microbatch_group_size_per_vp_stage if len(model.chunks) > 1 else 1
        return cls(
            budget=config.trainer.max_tokens_per_microbatch,
            tp=mpu.get_tensor_model_parallel_world_size(),
            device=model.device,
            thd=te,
            dense=not te and (model.device.type == "cpu" or fp32),
            cp=mpu.get_context_parallel_world_size(),
            cp_rank=mpu.get_context_parallel_rank(),
            count_multiple=multiple,
            balanced=config.trainer.packing == "karmarkar_karp",
            attention_length=model.flops.attention_length,
            routing=model.replay.routing if model.replay else None,
        )

    @property
    def length_multiple(self) -> int:
        """Every sequence is padded to a multiple of it."""
        return 2 * self.cp if self.cp > 1 else 1

    def padded_length(self, length: int) -> int:
        """Returns the length rounded up to length_multiple."""
        return -(-length // self.length_multiple) * self.length_multiple


def make_minibatches(
    samples: Sequence[TrainSample], version: int, packing: Packing, config: Config
) -> Minibatches:
    """Returns the micro-batches of this rank's samples, by minibatch; collective.

    A seeded shuffle splits the samples into algorithm.minibatches parts of equally many samples.
    """
    count = config.algorithm.minibatches
    order = np.arange(len(samples))
    if count > 1:
        order = np.random.default_rng((config.run.seed, version)).permutation(len(samples))
    allocate = bins.allocate
    if packing.balanced:
        allocate = partial(bins.allocate_balanced, attention_length=packing.attention_length)
    group = mpu.get_data_parallel_group()
    minibatches = []
    for part in np.array_split(order, count):
        chosen = [samples[n] for n in part]
        lengths = [packing.padded_length(len(s.ids)) for s in chosen]
        microbatches = bins.agree_on_bins(
            partial(allocate, lengths, packing.budget),
            group,
            packing.device,
            packing.count_multiple,
        )
        minibatches.append([pack([chosen[n] for n in m], version, packing) for m in microbatches])
    return minibatches


def pack(samples: Sequence[TrainSample], version: int, packing: Packing) -> Microbatch:
    """Returns the samples as one micro-batch of the training step that begins with `version`."""
    lengths = [packing.padded_length(len(s.ids)) for s in samples]
    multiple = packing.length_multiple * packing.tp
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
        flat = torch.from_numpy(np.concatenate([*padded, np.zeros(padding, bool)]))
        return sequences.shard(flat.to(packing.device, dtype))

    def next_of(array: np.ndarray, last: float = 0) -> np.ndarray:
        """Returns the array with entry t + 1 at t."""
        return np.append(array[1:], array.dtype.type(last))

    sample_W = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(packing.device)
    sample_index = SampleIndex(sequences.shard(sample_W), len(lengths))
    if packing.cp > 1:
        sample_index = replace(sample_index, reduce=context_parallel_sum)
    is_probed = any(s.probe_index >= 0 for s in samples)
    generated_by = [next_of(s.versions, NOT_GENERATED) for s in samples]
    return Microbatch(
        ids_T=joined([s.ids for s in samples], torch.int64),
        targets_T=joined([next_of(s.ids) for s in samples], torch.int64),
        mask_T=joined([g != NOT_GENERATED for g in generated_by], torch.bool),
        behavior_T=joined([next_of(s.logprobs) for s in samples], torch.float32),
        advantages_T=joined([next_of(s.advantages) for s in samples], torch.float32),
        staleness_T=joined([version - g for g in generated_by], torch.int32),
        sequences=sequences,
        sample_index=sample_index,
        num_tokens=sum(len(s.ids) for s in samples),
        cost=sum(bins.cost(len(s.ids), packing.attention_length) for s in samples),
        probe_T=joined([next_of(s.probe_slots()) for s in samples], torch.int32)
        if is_probed
        else None,
        experts_TLK=_experts(samples, lengths, sequences, packing.routing)
        if packing.routing
        else None,
    )


def _experts(
    samples: Sequence[TrainSample],
    lengths: list[int],
    sequences: PackedSequences,
    routing: Routing,
) -> Tensor:
    """Returns [T, layers, top_k]: the experts at each position that this rank holds."""
    # torch computes little with uint16
    dtype = np.uint8 if routing.dtype == np.uint8 else np.int16
    experts = np.zeros((sum(lengths), routing.width), dtype)
    start = 0
    for sample, length in zip(samples, lengths, strict=False):
        if len(sample.experts):  # else begun without rollout.routing_replay
            if (
                len(sample.experts) != len(sample.ids) * routing.width
                or sample.experts.max() >= routing.num_experts
            ):
                raise DataError(
                    "a batch has experts of another model than model.path, whose tokens have "
                    f"{routing.width} numbers below {routing.num_experts}",
                    "set model.path to the one that generated it, or rollout.routing_replay=false",
                )
            beside = sample.experts.reshape(len(sample.ids), -1)
            experts[start : start + len(beside) - 1] = beside[1:]
        start += length
    whole, held = torch.from_numpy(experts), sequences.shard_index_T
    here = whole if held is None else whole[held.cpu()]
    return here.view(-1, routing.num_layers, routing.top_k)
