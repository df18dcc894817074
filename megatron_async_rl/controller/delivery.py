"""Sends batches to the trainer: computes advantages and splits by data-parallel leader.

The loop hands over the batch that leaders wait for; `run` sends them their shares once the journal
is on disk, so the loop never waits for the disk. A leader that lost its share gets it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.advantage import (
    Advantages,
    check_estimator,
    needs_turns,
    reward_scale,
    sample_advantages,
    token_means,
)
from megatron_async_rl.controller.context import Context
from megatron_async_rl.controller.core.actions import ResendBatch, SendBatch
from megatron_async_rl.controller.core.groups import Group
from megatron_async_rl.controller.journal.reader import read_batch
from megatron_async_rl.controller.monitoring.mismatch import MismatchMonitor
from megatron_async_rl.controller.turns import rewards_at_ends, shaped_turns, turns_of
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.messages import Refused, TrainBatch
from megatron_async_rl.protocol.types import Sample, TrainSample

logger = logging.getLogger(__name__)


class BatchDelivery:
    def __init__(self, context: Context, mismatch: MismatchMonitor) -> None:
        self._mismatch = mismatch
        self._core = context.core
        self._config = context.config
        check_estimator(context.config.algorithm)  # before anything is generated
        self._journal = context.journal
        self._workers = context.workers
        self._progress = context.progress
        self._pending: dict[int, SendBatch | ResendBatch] = {}  # by version
        self._shares: list[list[TrainSample]] = []  # of the batch that was sent last
        self._version = -1  # of this batch
        self._changed = asyncio.Event()
        self.awaited_since: float | None = None  # when a leader requested a batch, if one waits

    def batch_requested(self, now: float) -> None:
        self.awaited_since = self.awaited_since or now

    def leader_joined(self, leader: int) -> None:
        """Withdraws what is pending for a leader that restarted: it requests its own batch."""
        self.awaited_since = None
        for version, batch in list(self._pending.items()):
            self._pending[version] = replace(batch, leaders=batch.leaders - {leader})

    def send(self, batch: SendBatch | ResendBatch) -> None:
        """Makes `run` send the batch to its leaders, and to those that it is pending for."""
        pending = self._pending.get(batch.version)
        leaders = batch.leaders | pending.leaders if pending else batch.leaders
        self._pending[batch.version] = replace(batch, leaders=leaders)
        self._changed.set()

    def step_reported(self, version: int) -> None:
        """Frees the shares of the batch that is now in the weights."""
        if self._version < version:
            self._shares, self._version = [], -1

    async def run(self) -> None:
        """Sends each pending batch once it is on disk: a batch the trainer saw is never lost.

        None is sent after DrainStarted: the trainer saves instead.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            versions = list(self._pending)  # the others are not on disk yet
            await self._journal.durable()
            for version in versions:
                batch = self._pending.pop(version)
                if batch.leaders and not self._core.draining:
                    await self._deliver(batch)
                    self.awaited_since = None

    async def _deliver(self, batch: SendBatch | ResendBatch) -> None:
        """Sends the shares; refuses a trainer that asks for a batch that is not recorded."""
        is_new = batch.version != self._version
        if is_new:
            try:
                rewards, advantages = await self._prepare(batch)
            except DataError as e:
                logger.error("the trainer is refused: %s", e)
                for leader in self._workers.leaders:
                    self._workers.refuse(leader.peer, str(e))
                    await self._workers.hub.send(leader.peer, Refused(str(e)))
                return
        for worker in self._workers.leaders:
            if worker.hello.leader in batch.leaders:
                share = TrainBatch(batch.version, self._shares[worker.hello.leader])
                await self._workers.send(worker.name, share)
        if is_new and isinstance(batch, SendBatch):
            waited_s = time.monotonic() - (self.awaited_since or time.monotonic())
            self._progress.batch_selected(batch, rewards, advantages, waited_s)

    async def _prepare(self, batch: SendBatch | ResendBatch) -> tuple[np.ndarray, np.ndarray]:
        """Makes the shares; returns rewards and advantages. Raises DataError."""
        groups = self._recorded(batch.version) if isinstance(batch, ResendBatch) else batch.groups
        rewards, advantages, samples = training_batch(groups, self._config)
        servers = self._core.fleet.rollout.values()
        probe = self._mismatch.choose(batch.version, samples, servers)  # marks samples
        self._shares = balanced_shares(samples, self._config.num_leaders)
        self._version = batch.version
        if probe:  # before the batch: after a short step the server has other weights
            await self._workers.send(*probe)
        return rewards, advantages

    def _recorded(self, version: int) -> list[Group]:
        """Returns the groups that were trained on `version`, from the journal."""
        admitted, returned, scored = read_batch(self._journal.path, version)
        count = self._config.algorithm.samples_per_prompt
        groups = {
            event.group_id: Group(event.group_id, None, "train", [None] * count, [None] * count)  # type: ignore[arg-type]
            for event in admitted
        }
        for event in returned:
            groups[event.group_id].samples[event.index] = event.sample
        for score in scored:
            groups[score.group_id].rewards[score.index] = score.reward
            groups[score.group_id].turn_rewards[score.index] = score.turn_rewards
        return list(groups.values())


def training_batch(
    groups: list[Group], config: Config
) -> tuple[np.ndarray, np.ndarray, list[TrainSample]]:
    """Returns (rewards [groups, samples], mean advantages [groups, samples], training samples).

    It depends on the recorded samples and rewards alone, so a batch that is sent again is the same.
    """
    algorithm = config.algorithm
    samples = [[sample for sample in group.samples if sample] for group in groups]
    rewards = np.asarray([group.rewards for group in groups], np.float64)
    tokens = np.asarray([[sample.num_generated for sample in row] for row in samples])
    turns = None
    if needs_turns(algorithm.advantage):
        turns = [
            [
                turns_of(sample, rewards[g, s], group.turn_rewards.get(s, ()))
                for s, sample in enumerate(samples[g])
            ]
            for g, group in enumerate(groups)
        ]
    advantages = sample_advantages(rewards, tokens, algorithm, config.rollout.max_new_tokens, turns)
    values: Advantages = advantages  # for the trainer
    if turns and algorithm.advantage.uses_critic:
        assert isinstance(advantages, np.ndarray)
        shaped = shaped_turns(turns, advantages, reward_scale(algorithm))
        values = [
            [rewards_at_ends(*pair) for pair in zip(*row, strict=True)]
            for row in zip(samples, shaped, strict=True)
        ]
    trained = [
        sequence
        for row, values_S in zip(samples, values, strict=True)
        for sample, value in zip(row, values_S, strict=True)
        for sequence in train_samples(sample, value)
    ]
    return rewards, token_means(advantages), trained


def balanced_shares(samples: list[TrainSample], num_shares: int) -> list[list[TrainSample]]:
    """Splits samples into shares of equal count, or one fewer, and nearly equal tokens.

    Longest first, each sample goes to the share with the fewest tokens that is not full.
    """
    share_size = -(-len(samples) // num_shares)
    shares: list[list[TrainSample]] = [[] for _ in range(num_shares)]
    tokens = [0] * num_shares
    for sample in sorted(samples, key=lambda s: len(s.ids), reverse=True):
        not_full = (i for i in range(num_shares) if len(shares[i]) < share_size)
        lightest = min(not_full, key=lambda i: tokens[i])
        shares[lightest].append(sample)
        tokens[lightest] += len(sample.ids)
    return shares


def train_samples(sample: Sample, advantage: float | np.ndarray) -> list[TrainSample]:
    """Returns the training sequences of a sample as the trainer takes them.

    `advantage`: one for all tokens, or an array with one entry per generated token. With a critic:
    the rewards.
    """
    if np.ndim(advantage):
        advantages = np.zeros(len(sample.ids), np.float32)
        advantages[sample.generated] = advantage
    else:
        advantages = np.full(len(sample.ids), advantage, np.float32)
    width = len(sample.experts) // len(sample.ids)  # per token
    return [
        TrainSample(
            sample.ids[s],
            sample.logprobs[s],
            sample.versions[s],
            advantages[s],
            experts=sample.experts[s.start * width : s.stop * width],
        )
        for s in sample.sequences()
    ]
