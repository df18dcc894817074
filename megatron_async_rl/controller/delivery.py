"""Sends batches to the trainer: computes advantages and splits by data-parallel leader.

The loop hands over the batch that the trainer waits for; `run` sends it once the journal is on
disk, so the loop never waits for the disk.
"""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np

from megatron_async_rl.controller.advantage import (
    Advantages,
    check_estimator,
    sample_advantages,
    token_means,
)
from megatron_async_rl.controller.context import Context
from megatron_async_rl.controller.core.actions import ResendBatch, SendBatch
from megatron_async_rl.controller.core.groups import Group
from megatron_async_rl.controller.monitoring.mismatch import MismatchMonitor
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

    def trainer_joined(self) -> None:
        """Withdraws the pending batch: a restarted trainer requests its own."""
        self._pending = self.awaited_since = None

    def send(self, batch: SendBatch | ResendBatch) -> None:
        """Has the batch sent by `run`, instead of one that is still pending."""
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
        rewards, advantages = self._advantages(batch.groups)
        samples = [
            sequence
            for g, group in enumerate(batch.groups)
            for s, sample in enumerate(group.samples)
            if sample is not None
            for sequence in train_samples(sample, advantages[g][s])
        ]
        probe = self._mismatch.choose(batch.version, samples, self._fleet.rollout.values())
        shares = balanced_shares(samples, self._config.num_leaders)
        if probe:  # before the batch: after a short step the server has other weights
            await self._workers.send(*probe)
        for worker in self._workers.leaders:
            share = TrainBatch(batch.version, shares[worker.hello.leader])
            await self._workers.send(worker.name, share)
        return rewards, token_means(advantages)

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
        admitted, returned, scored = self._journal.batch(version)
        count = self._config.algorithm.samples_per_prompt
        groups = {
            event.group_id: Group(event.group_id, None, "train", [None] * count, [None] * count)  # type: ignore[arg-type]
            for event in admitted
        }
        for event in returned:
            groups[event.group_id].samples[event.index] = event.sample
        for score in scored:
            groups[score.group_id].rewards[score.index] = score.reward
        return SendBatch(version, list(groups.values()))

    def _advantages(self, groups: list[Group]) -> tuple[np.ndarray, Advantages]:
        """Returns rewards [groups, samples] and advantages."""
        rewards = np.asarray([group.rewards for group in groups], np.float64)
        tokens = np.asarray(
            [[sample.num_generated for sample in group.samples if sample] for group in groups]
        )
        algorithm, max_new_tokens = self._config.algorithm, self._config.rollout.max_new_tokens
        return rewards, sample_advantages(rewards, tokens, algorithm, max_new_tokens)


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

    `advantage`: one for all tokens, or an array with one entry per generated token.
    """
    if np.ndim(advantage):
        advantages = np.zeros(len(sample.ids), np.float32)
        advantages[sample.generated] = advantage
    else:
        advantages = np.full(len(sample.ids), advantage, np.float32)
    return [
        TrainSample(sample.ids[s], sample.logprobs[s], sample.versions[s], advantages[s])
        for s in sample.sequences()
    ]
