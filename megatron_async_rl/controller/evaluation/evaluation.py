"""Evaluations of the run: when each is due, its samples, and its result.

`begin` and `ended` belong to the conductor task, `check` to the clock, the rest to the loop. The
core decides where samples run (core/evaluation.py); this file opens an evaluation, keeps its
samples on disk as they end, and abandons it when no server can complete it:

    begin ---EvaluationRequested--> core ---ReportEvaluated---> sample_ended   one per sample
    check ---EvaluationAbandoned-->      ---FinishEvaluation--> finish         metrics, vN.json

No evaluation makes the run fail: a result that cannot be written is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from typing import Any

import msgspec

from megatron_async_rl.controller.context import Context
from megatron_async_rl.controller.core.actions import FinishEvaluation, ReportEvaluated
from megatron_async_rl.controller.core.groups import EvaluationMode, EvaluationTask
from megatron_async_rl.controller.core.inputs import EvaluationAbandoned, EvaluationRequested
from megatron_async_rl.controller.evaluation import records
from megatron_async_rl.controller.evaluation.metrics import SetMetrics, set_metrics
from megatron_async_rl.controller.evaluation.records import EvaluatedSample, SampleFile
from megatron_async_rl.controller.weight_sync.catch_up import CatchUp
from megatron_async_rl.observability.status import EvaluationResult
from megatron_async_rl.protocol.types import Prompt

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Running:
    """The running evaluation."""

    version: int
    mode: EvaluationMode
    file: SampleFile
    num_samples: int
    started: float
    without_server_since: float | None = None


class Evaluations:
    """`prompts`: of each set in the configuration."""

    def __init__(
        self, context: Context, prompts: dict[str, list[Prompt]], catch_up: CatchUp
    ) -> None:
        self._context = context
        self._core = context.core
        self._config = context.config
        self._settings = context.config.evaluation
        self._prompts = prompts
        self._catch_up = catch_up
        self._running: _Running | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._snapshot = contextlib.ExitStack()  # keeps the snapshot of the version from pruning
        self._done = self._restore()

    def _restore(self) -> set[int]:
        """Shows the results of earlier starts and returns their versions."""
        done: set[int] = set()
        for version, results in records.read_results(self._config.run_dir):
            self._context.progress.evaluated(version, results)
            done.add(version)
        return done

    # ---- the conductor

    def is_due(self, version: int) -> bool:
        if not self._prompts or version in self._done:
            return False
        if version > 0 and not self._config.has_trainer:
            return False  # the weights are those of version 0
        settings, last = self._settings, self._config.run.steps
        if (settings.before and version == 0) or (settings.after and version == last):
            return True
        return bool(settings.every) and 0 < version < last and version % settings.every == 0

    async def begin(self, version: int) -> None:
        """Starts the evaluation of the version that servers serve, if one is due."""
        if not self.is_due(version):
            return
        if running := self._running:
            if running.version != version:  # servers may have taken this version again
                logger.warning(
                    "the evaluation of version %d is skipped: that of version %d is not complete "
                    "(raise evaluation.every, or use smaller sets)",
                    version, running.version,
                )  # fmt: skip
            return
        try:
            file = SampleFile(self._config.run_dir, version, self._header())
        except OSError as e:
            logger.error("the evaluation of version %d is skipped: %s", version, e)
            return
        # after the last step nothing is left that a pause could delay
        mode = self._settings.mode if version < self._config.run.steps else "pause"
        finished = {sample.key for sample in file.samples}
        tasks = [task for task in self._tasks() if task.key not in finished]
        num_samples = len(finished) + len(tasks)
        self._running = _Running(version, mode, file, num_samples, time.monotonic())
        self._idle.clear()
        is_training = self._core.admitting and version < self._config.run.steps
        if mode == "pause" and not is_training:
            self._context.progress.state = "evaluating"  # nothing else happens
        self._show(self._running)
        if snapshot := self._catch_up.snapshot_of(version):
            self._snapshot.enter_context(self._catch_up.keeping(snapshot))
        kept = f", {len(finished)} of them from an earlier start" if finished else ""
        logger.info("evaluation of version %d (%s): %d samples%s", version, mode, num_samples, kept)
        if tasks:
            await self._context.queue.submit(EvaluationRequested(version, mode, tasks))
        else:
            self.finish(FinishEvaluation(version, ""))

    async def ended(self) -> None:
        """Returns when no evaluation runs."""
        await self._idle.wait()

    async def allow_update(self, version: int) -> None:
        """Waits, with mode = pause, for the evaluation of an earlier version than this."""
        if (running := self._running) and running.mode == "pause" and running.version < version:
            await self._idle.wait()

    # ---- the loop

    def sample_ended(self, ended: ReportEvaluated) -> None:
        task, sample, running = ended.task, ended.sample, self._running
        assert running
        evaluated = EvaluatedSample(*task.key, ended.reward, answer=ended.answer)
        if sample is not None and ended.reward is not None:
            evaluated = msgspec.structs.replace(
                evaluated,
                tokens=sample.num_generated,
                stop=sample.stop,
                versions=[sample.oldest_version, sample.newest_version],
                text=sample.text,
            )
        try:
            running.file.append(evaluated)
        except OSError as e:
            logger.error("%s could not be written: %s", running.file.path, e)
        self._show(running)

    def finish(self, end: FinishEvaluation) -> None:
        """Writes and shows the result; an abandoned evaluation has none."""
        running = self._running
        assert running
        self._running, self._catch_up.wanted = None, None
        self._snapshot.close()
        self._context.workers.wake()  # a server may be free again
        running.file.close()
        self._context.progress.evaluating = ""
        if end.abandoned:
            logger.error(
                "the evaluation of version %d is abandoned after %d of %d samples: %s",
                end.version, len(running.file.samples), running.num_samples, end.abandoned,
            )  # fmt: skip
        else:
            self._report(running)
        self._idle.set()

    def _report(self, running: _Running) -> None:
        found = {name: self._metrics(name, running.file) for name in self._prompts}
        results = [
            EvaluationResult(running.version, name, metrics.values)
            for name, metrics in found.items()
        ]
        self._done.add(running.version)
        versions = [v for sample in running.file.samples for v in sample.versions]
        result = {
            "version": running.version,
            "mode": running.mode,
            "oldest_version": min(versions, default=None),
            "newest_version": max(versions, default=None),
            "seconds": round(time.monotonic() - running.started, 3),
            "model": self._config.model.path,
            "sets": {
                name: {
                    "settings": self._header()["sets"][name],
                    "metrics": metrics.values,
                    "left_out": metrics.left_out,
                    "interval": metrics.interval,
                    "problems": records.by_problem(name, running.file.samples),
                }
                for name, metrics in found.items()
            },
        }
        try:
            records.write_result(self._config.run_dir, running.version, result)
        except OSError as e:
            logger.error("the result of version %d could not be written: %s", running.version, e)
        for name, metrics in found.items():
            if "accuracy" in metrics.left_out:
                logger.error(
                    "evaluation of version %d, %s: no sample has a score", running.version, name
                )
            elif failed := int(metrics.values["failed"]):
                logger.warning(
                    "evaluation of version %d, %s: %d samples failed and count in no metric",
                    running.version, name, failed,
                )  # fmt: skip
        self._context.progress.evaluated(running.version, results)

    def _metrics(self, name: str, file: SampleFile) -> SetMetrics:
        rated = {
            prompt.prompt_id: float(rating)
            for prompt in self._prompts[name]
            if isinstance(rating := prompt.row.get("rating"), int | float)
        }
        samples = (sample for sample in file.samples if sample.set == name)
        return set_metrics(samples, self._settings.sets[name].samples, rated)

    # ---- the clock

    async def check(self) -> None:
        """Abandons an evaluation that cannot be completed, or that training must not wait for."""
        running, evaluation = self._running, self._core.evaluation
        if running is None or evaluation.mode in (None, "mixed"):
            return
        if reason := self._obstacle(running):
            await self._context.queue.submit(EvaluationAbandoned(reason))

    def _obstacle(self, running: _Running) -> str:
        """Returns why the evaluation must be abandoned; empty if it can continue."""
        core = self._core
        if core.evaluation.held_server():
            others = [w for w in core.fleet.rollout.values() if not (w.is_held or w.is_fenced)]
            return "" if others else "its server is the only one left and is needed for training"
        if core.evaluation.has_server():
            running.without_server_since, self._catch_up.wanted = None, None
            return ""
        now = time.monotonic()
        running.without_server_since = running.without_server_since or now
        waited_s, limit_s = now - running.without_server_since, self._config.rollout.start_timeout_s
        lost = f"its servers were lost, and no other serves version {running.version}"
        self._catch_up.wanted = self._catch_up.snapshot_of(running.version)
        if waited_s > limit_s:
            return f"{lost} within rollout.start_timeout_s = {limit_s:g}"
        # with mode = pause the trainer can send the version again, until it has made the next one
        training = running.version < self._config.run.steps
        can_resend = running.mode == "pause" and training and core.version == running.version
        if self._catch_up.wanted or can_resend:
            return ""
        return f"{lost} or has its snapshot (weights.snapshot_every)"

    # ---- samples

    def _tasks(self) -> list[EvaluationTask]:
        """Returns all samples, those with the longest responses in the last evaluation first.

        A long response that starts last would leave all servers but one idle at the end.
        """
        tasks = []
        for name, prompts in self._prompts.items():
            chosen = self._settings.sets[name]
            truncation = {n: getattr(chosen, n) for n in ("top_p", "top_k", "min_p")}
            limit = chosen.max_new_tokens or self._config.rollout.max_new_tokens
            tasks += [
                EvaluationTask(name, prompt, index, limit, chosen.temperature, truncation)
                for prompt in prompts
                for index in range(chosen.samples)
            ]
        tokens = records.mean_tokens(self._config.run_dir, max(self._done, default=-1))

        def known_tokens(task: EvaluationTask) -> float:
            return tokens.get((task.set_name, task.prompt.prompt_id), math.inf)

        return sorted(tasks, key=known_tokens, reverse=True)

    def _header(self) -> dict[str, Any]:
        """Returns the settings that the samples depend on besides the version."""
        sets = {name: msgspec.to_builtins(self._settings.sets[name]) for name in self._prompts}
        return {
            "model": self._config.model.path,
            "reward": self._config.reward.function,
            "workflow": self._config.rollout.workflow,
            "max_new_tokens": self._config.rollout.max_new_tokens,
            "sets": sets,
        }

    def _show(self, running: _Running) -> None:
        """Shows how far the evaluation is, in status.json."""
        held = self._core.evaluation.held_server()
        where = f"on {held.name}" if held else running.mode
        done = len(running.file.samples)
        self._context.progress.evaluating = (
            f"version {running.version}, {where}: {done} of {running.num_samples} samples"
        )
