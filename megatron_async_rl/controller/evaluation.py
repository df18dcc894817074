"""Evaluations: one sample of every evaluation prompt, under the weights that are served, before and after training."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import numpy as np

from megatron_async_rl.controller.core.actions import Action, EvalFinished
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.events import EvaluationFinished
from megatron_async_rl.controller.journal.journal import Journal
from megatron_async_rl.controller.progress import Progress
from megatron_async_rl.protocol.types import Prompt

logger = logging.getLogger(__name__)
_NO_REWARD = 0.0  # a sample that could not be had counts as wrong, and the log says so


class Evaluation:
    def __init__(
        self,
        prompts: list[Prompt],
        core: Core,
        journal: Journal,
        progress: Progress,
        act: Callable[[list[Action]], Awaitable[None]],
    ) -> None:
        self._prompts = prompts
        self._core = core
        self._journal = journal
        self._progress = progress
        self._act = act
        self._done: set[int] = set()  # versions
        self._result: asyncio.Future[EvalFinished] | None = None

    def known(self, fact: EvaluationFinished) -> None:
        """Made in an earlier life."""
        self._done.add(fact.version)
        self._progress.evaluated(fact.version, fact.accuracy, fact.num)

    def finished(self, result: EvalFinished) -> None:
        if self._result is not None and not self._result.done():
            self._result.set_result(result)

    async def run(self) -> None:
        """Of the version now served, unless that was done."""
        if not self._prompts or self._core.version in self._done:
            return
        self._progress.state = "evaluating"
        self._result = asyncio.get_running_loop().create_future()
        await self._act(self._core.start_eval(self._prompts, time.monotonic()))
        result = await self._result
        rewards = [reward for group in result.groups for reward in group.rewards]
        if failed := rewards.count(None):
            logger.warning(
                "%d of %d evaluation samples could not be had and count as wrong",
                failed,
                len(rewards),
            )
        accuracy = float(np.mean([_NO_REWARD if reward is None else reward for reward in rewards]))
        fact = EvaluationFinished(result.version, accuracy, len(rewards))
        self.known(fact)
        self._journal.append([fact])
