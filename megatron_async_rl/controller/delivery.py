"""Sends batches to the trainer: computes advantages and splits by data-parallel leader.

The loop hands over the batch that the trainer waits for; `run` sends it once the journal is on
disk, so the loop never waits for the disk.
"""

from __future__ import annotations

import asyncio
import logging
import time

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
        self._fleet = context.core.fleet
        self._config = context.config
        check_estimator(context.config.algorithm)  # before anything is generated
        self._journal = context.journal
        self._workers = context.workers
        self._progress = context.progress
        self._pending: SendBatch | ResendBatch | None = None
        self._changed = asyncio.Event()
        self.awaited_since: float | None = None  # when a leader requested a batch, if one waits

    def batch_requested(self, now: float) -> None:
        self.awaited_since = self.awaited_since or now

    def leader_joined(self) -> None:
        """Withdraws the pending batch: a restarted trainer requests its own."""
        self._pending = self.awaited_since = None

    def send(self, batch: SendBatch | ResendBatch) -> None:
        """Makes `run` send the batch, in place of one that is still pending."""
        self._pending = batch
        self._changed.set()

    async def run(self) -> None:
        """Sends each pending batch once it is on disk: a batch the trainer saw is never lost."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            batch = self._pending
            await self._journal.durable()
            if batch is None or batch is not self._pending:
                continue
            self._pending = None
            if isinstance(batch, ResendBatch):
                await self._resend(batch.version)
            else:
                rewards, advantages = await self._send(batch)
                waited_s = time.monotonic() - (self.awaited_since or time.monotonic())
                self._progress.batch_selected(batch, rewards, advantages, waited_s)
            self.awaited_since = None

    async def _send(self, batch: SendBatch) -> tuple[np.ndarray, np.ndarray]:
        rewards, advantages, samples = training_batch(batch.groups, self._config)
        probe = self._mismatch.choose(batch.version, samples, self._fleet.rollout.values())
        shares = balanced_shares(samples, self._config.num_leaders)
        if probe:  # before the batch: after a short step the server has other weights
            await self._workers.send(*probe)
        for worker in self._workers.leaders:
            share = TrainBatch(batch.version, shares[worker.hello.leader])
            await self._workers.send(worker.name, share)
        return rewards, advantages

    async def _resend(self, version: int) -> None:
        """Sends a recorded batch; refuses a trainer that asks for one that is not recorded."""
        try:
            batch = self._recorded(version)
        except DataError as e:
            logger.error("the trainer is refused: %s", e)
            for leader in self._workers.leaders:
                self._workers.refuse(leader.peer, str(e))
                await self._workers.hub.send(leader.peer, Refused(str(e)))
        else:
            await self._send(batch)

    def _recorded(self, version: int) -> SendBatch:
        """Returns the batch that was trained on `version`, from the journal."""
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
        return SendBatch(version, list(groups.values()))


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
