"""Evaluations before and after training: one sample per evaluation prompt, under served weights."""

from __future__ import annotations

import asyncio
import logging

import numpy as np

from megatron_async_rl.controller.context import Context
from megatron_async_rl.controller.core.actions import FinishEvaluation
from megatron_async_rl.controller.core.events import EvaluationFinished
from megatron_async_rl.controller.core.inputs import EvaluationRequested
from megatron_async_rl.protocol.types import Prompt

logger = logging.getLogger(__name__)


class Evaluation:
    def __init__(self, context: Context, prompts: list[Prompt]) -> None:
        self._context = context
        self._prompts = prompts
        self._done: set[int] = set()  # versions
        self._finished = asyncio.Event()

    def restore(self, event: EvaluationFinished) -> None:
        """Notes the result of an evaluation, also of one before a restart of the controller."""
        self._done.add(event.version)
        self._context.progress.evaluated(event.version, event.accuracy, event.num)

    def finish(self, result: FinishEvaluation) -> None:
        """Journals the result; a sample that could not be generated or scored counts as wrong.

        If that is so for all samples, there is no result.
        """
        rewards = [reward for group in result.groups for reward in group.rewards]
        if failed := rewards.count(None):
            logger.warning(
                "%d of %d evaluation samples failed and count as wrong", failed, len(rewards)
            )
        if failed == len(rewards):
            logger.error("evaluation of version %d: no sample has a score", result.version)
            self._done.add(result.version)
            self._finished.set()
            return
        accuracy = float(np.mean([0.0 if reward is None else reward for reward in rewards]))
        event = EvaluationFinished(result.version, accuracy, len(rewards))
        self._context.journal.append([event])
        self.restore(event)
        self._finished.set()

    async def run(self) -> None:
        """Evaluates the served version, unless that was done before."""
        if not self._prompts or self._context.core.version in self._done:
            return
        self._context.progress.state = "evaluating"
        self._finished.clear()
        await self._context.queue.submit(EvaluationRequested(self._prompts))
        await self._finished.wait()
