"""Turns events of the run into metrics, one log line per step, and status.json."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.core.actions import SendBatch
from megatron_async_rl.controller.core.fleet import Fleet
from megatron_async_rl.controller.weight_sync.session import Outcome
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.observability.sample_log import TrainedGroup
from megatron_async_rl.observability.status import (
    EvaluationResult,
    RunState,
    RunStatus,
    ServerStatus,
)
from megatron_async_rl.protocol.types import Sample

logger = logging.getLogger(__name__)
ETA_STEPS = 8  # the remaining time is estimated from this many steps


class Progress:
    def __init__(self, run_log: RunLog, config: Config) -> None:
        self.state: RunState = "starting"
        self.message = ""
        self.ledger: dict[str, int] = {}
        self.last_progress = time.monotonic()
        self.lost: list[str] = []  # silent workers, which the supervisor should restart
        self._log = run_log
        self._write_error = ""
        self._status = RunStatus(
            steps=config.run.steps,
            staleness_limit=config.staleness.max_staleness,
            staleness_worst=run_log.staleness_worst,
        )
        self._training_began = 0.0
        self._last_step = 0.0
        self._step_times: deque[float] = deque(maxlen=ETA_STEPS)
        self._generated_tokens = 0  # since the last step
        self._waited_s = 0.0  # how long the trainer waited for the batch of this step
        self._updating_s = 0.0
        self._step_stats: dict[str, float] = {}  # of the current step

    @property
    def training(self) -> bool:
        return self.state == "training"

    def begin_training(self) -> None:
        self.state, self.message = "training", ""
        self._training_began = self._last_step = self.last_progress = time.monotonic()
        self._updating_s = 0.0
        self._generated_tokens = 0

    def resumed(self, version: int, ledger: dict[str, int]) -> None:
        self._status.version, self.ledger = version, ledger
        state = ", ".join(f"{name} {count}" for name, count in ledger.items())
        logger.info("resumed from the journal: version %d, ledger: %s", version, state)

    def replayed(self, version: int, newest: int) -> None:
        self.last_progress = time.monotonic()
        logger.info(
            "the trainer repeated the step to version %d of %d with a recorded batch",
            version,
            newest,
        )

    def say(self, message: str) -> None:
        """Sets the message shown beside the state."""
        self.message = message

    def warn(self, message: str) -> None:
        self.message = message
        logger.warning("%s", message)

    def generated(self, sample: Sample) -> None:
        self.last_progress = time.monotonic()
        self._generated_tokens += sample.num_generated
        self._status.interrupted_samples += sample.num_interrupts > 0

    def batch_selected(
        self, batch: SendBatch, rewards: np.ndarray, advantages: np.ndarray, waited_s: float
    ) -> None:
        """`rewards`, `advantages`: [groups, samples]. `waited_s`: how long the trainer waited."""
        status, version = self._status, batch.version
        trained = [
            TrainedGroup(
                group_id=group.group_id,
                prompt_id=group.prompt.prompt_id,
                samples=[sample for sample in group.samples if sample is not None],
                rewards=rewards[g].tolist(),
                advantages=advantages[g].tolist(),
            )
            for g, group in enumerate(batch.groups)
        ]
        self._record(self._log.write_samples, version, trained)
        runs = [
            run for group in trained for sample in group.samples for run in sample.version_runs()
        ]
        tokens = sum(count for _, count in runs)
        late = sum((version - v) * count for v, count in runs)
        status.staleness_mean = late / tokens if tokens else 0.0
        status.staleness_max = max((version - v for v, _ in runs), default=0)
        status.staleness_worst = max(status.staleness_max, status.staleness_worst or 0)
        status.reward_mean = float(rewards.mean())
        status.reward_history.append(status.reward_mean)
        self._waited_s = self._step_stats["perf/time/wait_for_batch_s"] = waited_s

    def step_done(self, version: int, stats: dict[str, float]) -> None:
        now = time.monotonic()
        self.last_progress = now
        step_s = now - self._last_step
        self._last_step = now
        self._step_times.append(step_s)
        status = self._status
        status.version = version
        status.step_s = step_s
        status.eta_s = (status.steps - version) * float(np.mean(self._step_times))
        status.train_wait_fraction = self._waited_s / step_s
        status.generate_tokens_per_s = self._generated_tokens / step_s
        status.reward_all_mean = stats.get("reward/all_mean")
        self._step_stats |= stats
        self._step_stats["perf/time/step_s"] = step_s
        self._step_stats["perf/generate_tokens_per_s"] = status.generate_tokens_per_s
        if (tokens := stats.get("train/tokens")) is not None:
            busy_s = stats["perf/time/proximal_s"] + stats["perf/time/train_s"]
            status.train_tokens_per_s = self._step_stats["perf/train_tokens_per_s"] = (
                tokens / step_s
            )
            self._step_stats["perf/trainer_busy_tokens_per_s"] = tokens / busy_s
        self._step_stats |= {
            f"ledger/{name.replace('.', '_')}": count for name, count in self.ledger.items()
        }
        self._record(self._log.write_scalars, version, self._step_stats)
        waited_s = self._waited_s
        self._step_stats, self._generated_tokens, self._waited_s = {}, 0, 0.0
        state = ", ".join(f"{name} {count}" for name, count in self.ledger.items())
        logger.info(
            "step %d/%d: reward %.3f (all scored groups %.3f), staleness mean %.2f max %d "
            "(worst %d), loss %.4f, step %.1f s, waited %.1f s; ledger: %s",
            version, status.steps, status.reward_mean, stats.get("reward/all_mean", math.nan),
            status.staleness_mean, status.staleness_max, status.staleness_worst,
            stats.get("train/loss", math.nan), step_s, waited_s, state,
        )  # fmt: skip

    def published(self, outcome: Outcome) -> None:
        self.last_progress = time.monotonic()
        self._updating_s += outcome.seconds["total"]
        self._status.update_s = outcome.seconds["total"]
        if self.training:
            self._status.update_fraction = self._updating_s / (
                self.last_progress - self._training_began
            )
        self._record(
            self._log.write_scalars,
            outcome.version,
            {f"sync/{phase}_s": value for phase, value in outcome.seconds.items()},
        )
        phases = ", ".join(f"{phase} {value:.3f}" for phase, value in outcome.seconds.items())
        logger.info(
            "version %d is served by %s; %d requests interrupted; seconds: %s",
            outcome.version, ", ".join(outcome.serving), outcome.num_interrupted, phases,
        )  # fmt: skip

    def evaluated(self, version: int, accuracy: float, num: int) -> None:
        self._status.evals.append(EvaluationResult(version, accuracy, num))
        self._record(self._log.write_scalars, version, {"eval/accuracy": accuracy})
        logger.info("evaluation of version %d: %.1f %% of %d", version, 100 * accuracy, num)

    def write(self, fleet: Fleet) -> None:
        """Writes status.json."""
        status = self._status
        status.state, status.message, status.ledger = self.state, self.message, self.ledger
        status.lost = self.lost
        if self.training and not self._step_times:  # until a step gives the rate
            seconds = time.monotonic() - self._last_step
            status.generate_tokens_per_s = self._generated_tokens / seconds
        status.fleet = [
            ServerStatus(w.name, w.state.value, w.version, w.load) for w in fleet.rollout.values()
        ]
        self._record(self._log.write_status, status)

    def end(self, state: RunState, message: str) -> None:
        self.state, self.message = state, message
        self.write(Fleet())

    def _record(self, write: Callable[..., None], *values: Any) -> None:
        """Writes a log; a full disk costs log entries and never the run."""
        try:
            write(*values)
        except OSError as e:
            if self._write_error != str(e):
                logger.error("%s could not write: %s; the run continues", write.__name__, e)
            self._write_error = str(e)
