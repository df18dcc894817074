"""Forward passes before the optimizer steps, for logprobs that the loss compares with.

    reference   logprobs of the starting policy, for the KL term
    proximal    logprobs of the weights that this training step begins with
    M2 mask     tokens that M2PO keeps, from the proximal logprobs

Suffix T: tokens of a micro-batch that this rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_async_rl.config.config import Config
from megatron_async_rl.trainer import pipeline
from megatron_async_rl.trainer.algorithms import objectives
from megatron_async_rl.trainer.algorithms.importance import kl_reward_to_go, second_moment_cutoff
from megatron_async_rl.trainer.algorithms.reference import reference_weights
from megatron_async_rl.trainer.data.microbatch import Microbatch, Minibatches
from megatron_async_rl.trainer.model.build import TrainerModel
from megatron_async_rl.trainer.model.logprobs import token_logprobs


def add_reference_logprobs(
    model: TrainerModel, minibatches: Minibatches, config: Config
) -> Minibatches:
    """Returns the minibatches with the starting policy's logprobs, if kl.coef is set; collective.

    With kl.apply_to = reward the KL is subtracted from the advantages; with a critic that follows
    in critic.add_advantages.
    """
    kl = config.algorithm.kl
    if not kl.coef:
        return minibatches
    with reference_weights(model, config):
        logprobs = current_logprobs(model, minibatches, config)
    if not logprobs:
        return minibatches

    def filled(microbatch: Microbatch) -> Microbatch:
        microbatch = replace(microbatch, reference_T=logprobs.pop(0))
        if kl.apply_to == "loss" or model.critic:
            return microbatch
        pack = microbatch.gather_context_parallel()
        assert pack.reference_T is not None
        kl_T = microbatch.sequences.shard(
            kl_reward_to_go(pack.behavior_T, pack.reference_T, pack.mask_T, pack.sample_index)
        )
        return replace(microbatch, advantages_T=microbatch.advantages_T - kl.coef * kl_T)

    return [[filled(microbatch) for microbatch in minibatch] for minibatch in minibatches]


def add_proximal_logprobs(
    model: TrainerModel, minibatches: Minibatches, config: Config
) -> Minibatches:
    """Returns the minibatches with proximal logprobs where the loss needs them; collective.

    A minibatch before the first optimizer step needs none: its current policy is the proximal one.
    So no pass is made for a single minibatch (except for M2PO), and with reuse_first_minibatch none
    for the first.
    """
    correction = config.algorithm.staleness_correction
    if not objectives.load(config.algorithm).decoupled or correction.proximal == "loglinear":
        return minibatches[:1] + [
            [replace(microbatch, proximal_missing=True) for microbatch in minibatch]
            for minibatch in minibatches[1:]
        ]
    if len(minibatches) == 1 and correction.m2_threshold is None:
        return minibatches
    first = 1 if correction.proximal == "reuse_first_minibatch" else 0
    logprobs = current_logprobs(model, minibatches[first:], config)
    if not logprobs:
        return minibatches
    return minibatches[:first] + [
        [replace(microbatch, proximal_T=logprobs.pop(0)) for microbatch in minibatch]
        for minibatch in minibatches[first:]
    ]


def add_m2_mask(minibatches: Minibatches, config: Config) -> Minibatches:
    """Returns the minibatches with M2PO's mask, if m2_threshold is set.

    The mask depends on all tokens of the batch. Collective over the last pipeline stage.
    """
    threshold = config.algorithm.staleness_correction.m2_threshold
    if threshold is None or not mpu.is_pipeline_last_stage():
        return minibatches

    def squares_T(microbatch: Microbatch) -> Tensor:
        assert microbatch.proximal_T is not None
        return (microbatch.proximal_T - microbatch.behavior_T).square()

    def reduce(sums: Tensor) -> Tensor:
        dist.all_reduce(sums, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return sums

    flat = [microbatch for minibatch in minibatches for microbatch in minibatch]
    squares = torch.cat([squares_T(m)[m.mask_T] for m in flat])
    cutoff = second_moment_cutoff(squares, threshold, reduce)
    return [[replace(m, m2_mask_T=squares_T(m) <= cutoff) for m in mini] for mini in minibatches]


def policy_logprobs(
    model: TrainerModel, config: Config, microbatch: Microbatch, logits: Tensor, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Returns the targets' (logprobs [T], entropy [T] or zeros) from logits [1, T, V].

    Overwrites the logits in backward.
    """
    return token_logprobs(
        logits[0],
        microbatch.targets_T,
        vocab_size=model.shape.vocab_size,
        temperature=config.rollout.temperature,
        group=mpu.get_tensor_model_parallel_group(),
        entropy=entropy,
        overwrite_logits=True,
    )


def current_logprobs(model: TrainerModel, minibatches: Minibatches, config: Config) -> list[Tensor]:
    """Returns the logprobs [T] of every micro-batch, in order; empty before the last stage."""
    flat = [microbatch for minibatch in minibatches for microbatch in minibatch]
    return pipeline.evaluate(model, flat, partial(_logprobs_step, model, config))


def _logprobs_step(
    model: TrainerModel, config: Config, data: Iterator[Microbatch], chunk: torch.nn.Module
) -> tuple[Tensor, Any]:
    microbatch = next(data)

    def collect(logits: Tensor, non_loss_data: bool) -> Tensor:
        return policy_logprobs(model, config, microbatch, logits, entropy=False)[0]

    return pipeline.forward(model, chunk, microbatch), collect
