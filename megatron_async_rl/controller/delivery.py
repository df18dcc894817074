"""Batches to the trainer: advantages, one share per data-parallel leader, and the recorded ones again."""

from __future__ import annotations

import time

import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.advantage import sample_advantages
from megatron_async_rl.controller.batching import balanced_shares, train_sample
from megatron_async_rl.controller.core.actions import SendBatch
from megatron_async_rl.controller.core.groups import Group
from megatron_async_rl.controller.journal.journal import Journal
from megatron_async_rl.controller.progress import Progress
from megatron_async_rl.controller.workers import Workers
from megatron_async_rl.protocol.messages import TrainBatch


class Delivery:
    def __init__(
        self, config: Config, journal: Journal, workers: Workers, progress: Progress
    ) -> None:
        self._config = config
        self._journal = journal
        self._workers = workers
        self._progress = progress
        self.awaited_since: float | None = None  # a leader has asked and got nothing yet

    def wanted(self, now: float) -> None:
        self.awaited_since = self.awaited_since or now

    def trainer_joined(self) -> None:
        self.awaited_since = None

    async def send(self, cut: SendBatch) -> None:
        await self._journal.durable()  # a batch that the trainer has seen is never forgotten
        rewards, advantages = await self._send(cut)
        waited_s = time.monotonic() - (self.awaited_since or time.monotonic())
        self.awaited_since = None
        self._progress.batch_cut(cut.version, cut.groups, rewards, advantages, waited_s)

    async def send_again(self, version: int) -> None:
        """The batch that was trained on `version`, from the journal."""
        await self._send(self._recorded(version))
        self.awaited_since = None

    async def _send(self, cut: SendBatch) -> tuple[np.ndarray, np.ndarray]:
        rewards, advantages = self._advantages(cut.groups)
        samples = [
            train_sample(sample, float(advantages[g, s]))
            for g, group in enumerate(cut.groups)
            for s, sample in enumerate(group.samples)
            if sample is not None
        ]
        shares = balanced_shares(samples, self._config.num_leaders)
        for worker in self._workers.leaders:
            await self._workers.send(
                worker.name, TrainBatch(cut.version, shares[worker.hello.leader])
            )
        return rewards, advantages

    def _recorded(self, version: int) -> SendBatch:
        admitted, returned, judged = self._journal.batch(version)
        count = self._config.algorithm.samples_per_prompt
        groups = {
            f.group_id: Group(f.group_id, None, "train", [None] * count, [None] * count)
            for f in admitted
        }
        for sample in returned:
            groups[sample.group_id].samples[sample.index] = sample.sample
        for verdict in judged:
            groups[verdict.group_id].rewards[verdict.index] = verdict.reward
        return SendBatch(version, list(groups.values()))

    def _advantages(self, groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and advantages, [groups, samples]."""
        rewards = np.asarray([group.rewards for group in groups], np.float64)
        tokens = np.asarray(
            [[sample.num_generated for sample in group.samples if sample] for group in groups]
        )
        return rewards, sample_advantages(
            rewards, tokens, self._config.algorithm, self._config.rollout.max_new_tokens
        )
