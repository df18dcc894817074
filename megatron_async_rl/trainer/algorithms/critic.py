"""PPO's critic: predicts the rewards of the rest of a sample; never sent to the servers.

It has the policy's architecture and parallel layout, weights from critic.path (else model.path), a
value head instead of the output layer, and its own optimizer and learning rate. In each training
step its values give the advantages (gae.py); then policy and critic train on the same
micro-batches.

Suffixes: T tokens of a micro-batch that this rank holds, W tokens of the whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.config.config import Config
from megatron_async_rl.trainer import pipeline
from megatron_async_rl.trainer.algorithms import gae
from megatron_async_rl.trainer.data.microbatch import Microbatch, Minibatches
from megatron_async_rl.trainer.model.build import TrainerModel

ADVANTAGE_EPS = 1e-5  # as in controller/advantage.py


def add_advantages(critic: TrainerModel, minibatches: Minibatches, config: Config) -> Minibatches:
    """Returns the minibatches with values, returns and advantages (last pipeline stage only).

    Until then their advantages_T holds the rewards of the tokens. Collective.
    """
    flat = [microbatch for minibatch in minibatches for microbatch in minibatch]
    values = pipeline.evaluate(critic, flat, partial(_value_step, critic))
    if not values:
        return minibatches
    filled = [_estimated(m, v, config.algorithm) for m, v in zip(flat, values, strict=True)]
    if config.algorithm.advantage.batch_normalize:
        filled = _normalized(filled)
    given = iter(filled)
    return [[next(given) for _ in minibatch] for minibatch in minibatches]


def accumulate_gradients(
    critic: TrainerModel, minibatch: list[Microbatch], config: Config
) -> dict[str, float]:
    """Runs forward and backward over a minibatch; returns the global SUMS.

    The gradient is left in the buffers. Collective.
    """
    parts = pipeline.accumulate_gradients(critic, minibatch, partial(_loss_step, critic, config))
    sums = torch.zeros(len(gae.SUMS), dtype=torch.float64, device=critic.device)
    if parts and mpu.get_tensor_model_parallel_rank() == 0:
        sums = torch.stack(parts).sum(0)
    dist.all_reduce(sums)
    return dict(zip(gae.SUMS, sums.tolist(), strict=True))


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Returns the critic's metrics of a training step, from the gae.SUMS of its minibatches."""
    total = {
        name: sum(step[name] for step in steps) for name in (*gae.SUMS, "grad_norm", "overflowed")
    }
    tokens = max(total["tokens"], 1)
    mean = total["return"] / tokens
    variance = total["return_squared"] / tokens - mean**2
    return {
        "critic/loss": total["value_loss"] / tokens,
        "critic/grad_norm": total["grad_norm"] / max(1, len(steps) - total["overflowed"]),
        "critic/value_mean": total["value"] / tokens,
        "critic/return_mean": mean,
        "critic/explained_variance": 1 - total["error_squared"] / tokens / max(variance, 1e-12),
        "critic/clip_fraction": total["value_clipped"] / tokens,
        "critic/overflowed_minibatches": total["overflowed"],
    }


def _estimated(microbatch: Microbatch, values_T: Tensor, algorithm: AlgorithmConfig) -> Microbatch:
    microbatch = replace(microbatch, values_T=values_T)
    pack = microbatch.gather_context_parallel()
    assert pack.values_T is not None
    rewards_W = pack.advantages_T
    if algorithm.kl.coef and algorithm.kl.apply_to == "reward":
        assert pack.reference_T is not None
        kl_W = pack.behavior_T - pack.reference_T
        rewards_W = rewards_W - algorithm.kl.coef * torch.where(pack.mask_T, kl_W, 0.0)
    estimates = gae.generalized_advantages(
        pack.values_T,
        rewards_W,
        pack.mask_T,
        pack.sample_index,
        algorithm.advantage.gamma,
        algorithm.advantage.gae_lambda,
        of_turns=algorithm.advantage.estimator == "turn_gae",
    )
    advantages_T, returns_T = (microbatch.sequences.shard(x_W).float() for x_W in estimates)
    return replace(microbatch, advantages_T=advantages_T, returns_T=returns_T)


def _normalized(microbatches: list[Microbatch]) -> list[Microbatch]:
    """Normalizes the advantages over the masked tokens of the global batch; collective."""
    group = mpu.get_data_parallel_group(with_context_parallel=True)

    def total(values_of: Callable[[Microbatch], Tensor]) -> Tensor:
        sums = torch.stack(
            [torch.where(m.mask_T, values_of(m), 0.0).sum() for m in microbatches]
        ).sum()
        dist.all_reduce(sums, group=group)
        return sums

    count = total(lambda m: torch.ones_like(m.advantages_T, dtype=torch.float64)).clamp(min=1)
    mean = total(lambda m: m.advantages_T.double()) / count
    deviation = (total(lambda m: (m.advantages_T.double() - mean).square()) / count).sqrt()
    return [
        replace(
            m, advantages_T=((m.advantages_T.double() - mean) / (deviation + ADVANTAGE_EPS)).float()
        )
        for m in microbatches
    ]


def _value_step(
    critic: TrainerModel, data: Iterator[Microbatch], chunk: nn.Module
) -> tuple[Tensor, Any]:
    def collect(values: Tensor, non_loss_data: bool) -> Tensor:
        return values[0, :, 0]

    return pipeline.forward(critic, chunk, next(data)), collect


def _loss_step(
    critic: TrainerModel, config: Config, data: Iterator[Microbatch], chunk: nn.Module
) -> tuple[Tensor, Any]:
    microbatch = next(data)

    def loss_of(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert microbatch.values_T is not None and microbatch.returns_T is not None
        loss, sums = gae.value_loss(
            values[0, :, 0],
            microbatch.values_T,
            microbatch.returns_T,
            microbatch.mask_T,
            config.critic.clip_eps,
        )
        count = microbatch.mask_T.sum(dtype=torch.int32)
        return loss, count, torch.stack([sums[name].double() for name in gae.SUMS])

    return pipeline.forward(critic, chunk, microbatch), loss_of
