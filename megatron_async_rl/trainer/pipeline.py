"""Runs micro-batches through the pipeline: 1F1B, or interleaved if a rank holds several chunks.

In an interleaved pipeline chunk c of stage s holds the layers of virtual stage c * stages + s, and
every chunk gets the same micro-batches in the same order. As Megatron's schedules require, a Step
takes (iterator of micro-batches, chunk) and returns (output, function of the output).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_async_rl.trainer.data.microbatch import Microbatch
from megatron_async_rl.trainer.model.build import TrainerModel

Step = Callable[[Iterator[Microbatch], torch.nn.Module], tuple[Tensor, Any]]


def run(
    model: TrainerModel,
    microbatches: list[Microbatch],
    step: Step,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list:
    """Runs micro-batches forward and, unless forward_only, backward; collective.

    Returns the results of `step`'s functions for each micro-batch on the last stage, else [].
    """
    if model.replay:
        model.replay.clear()
    several = len(model.chunks) > 1
    iterators = [iter(microbatches) for _ in model.chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if several else iterators[0],
        model=model.chunks if several else model.chunks[0],
        num_microbatches=len(microbatches),
        seq_length=1,  # unused: with variable_seq_lengths shapes are sent with the tensors
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


def accumulate_gradients(model: TrainerModel, microbatches: list[Microbatch], step: Step) -> list:
    """Runs forward and backward into zeroed gradient buffers; returns as `run` does."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    return run(model, microbatches, step, forward_only=False)


def evaluate(model: TrainerModel, microbatches: list[Microbatch], step: Step) -> list:
    """Runs forward passes without gradients; returns as `run` does."""
    for chunk in model.chunks:
        chunk.eval()
    with torch.no_grad():
        collected = run(model, microbatches, step, forward_only=True, collect=True)
    for chunk in model.chunks:
        chunk.train()
    return collected


def forward(model: TrainerModel, chunk: torch.nn.Module, microbatch: Microbatch) -> Tensor:
    """Returns logits [1, T, V] of this rank's part of the vocabulary, in the model's precision.

    A critic returns values [1, T, 1]; stages before the last return hidden states.
    """
    positions_T = microbatch.sequences.positions_T
    assert positions_T is not None
    options = {"fp32_output": False} if model.config.bf16 or model.config.fp16 else {}
    replay = model.replay.of(microbatch.experts_TLK) if model.replay else nullcontext()
    with replay:
        return chunk(
            microbatch.ids_T[None],
            positions_T[None],
            None,
            packed_seq_params=microbatch.sequences,
            **options,
        )
