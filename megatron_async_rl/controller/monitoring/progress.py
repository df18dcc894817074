"""Turns events of the run into metrics, one log line per step, and status.json."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.core.actions import SendBatch
from megatron_async_rl.controller.core.fleet import Fleet, RolloutWorker
from megatron_async_rl.controller.core.groups import FAILURES, DropReason, Group
from megatron_async_rl.controller.journal.events import StepReported
from megatron_async_rl.controller.weight_sync.session import Outcome
from megatron_async_rl.observability.evaluation_table import evaluation_table
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.observability.sample_log import TrainedGroup
from megatron_async_rl.observability.status import (
    FINAL_STATES,
    EvaluationResult,
    RunState,
    RunStatus,
    ServerStatus,
)
from megatron_async_rl.protocol.types import Sample

logger = logging.getLogger(__name__)
MAX_NOTES = 5  # in the status; all are in the log
ETA_STEPS = 8  # the remaining time is estimated from this many steps


class Progress:
    def __init__(self, run_log: RunLog, config: Config) -> None:
        self.state: RunState = "starting"
        self.message = ""
        self.ledger: dict[str, int] = {}
        self.last_progress = time.monotonic()
        self.lost: list[str] = []  # silent workers, which the supervisor should restart
        self.evaluating = ""  # the running evaluation
        self._log = run_log
        self._write_error = ""
        self._server_names = [f"rollout-{i}" for i in range(config.rollout.servers)]
        self._num_gpus = config.trainer_ranks + config.rollout.servers * config.engine_tp
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
        self._dropped: Counter[str] = Counter()  # groups since the last step, by reason
        self._reasons_seen: set[str] = set()

    @property
    def training(self) -> bool:
        return self.state == "training"

    def begin_training(self) -> None:
        self.state, self.message = "training", ""
        self._training_began = self._last_step = self.last_progress = time.monotonic()
        self._updating_s = 0.0
        self._generated_tokens = 0

    def restore(self, step: StepReported) -> None:
        """Notes a step that was reported before a restart of the controller."""
        self._status.reward_history.append(step.reward_mean)
        self._step_times.append(step.seconds)

    def resumed(self, version: int, ledger: dict[str, int], in_batch: list[Group]) -> None:
        """`in_batch`: the groups that are being trained."""
        self._status.version, self.ledger = version, ledger
        self._estimate_end()
        if in_batch:
            samples = [sample for group in in_batch for sample in group.samples if sample]
            rewards = [reward for group in in_batch for reward in group.rewards]
            self._show_batch(version, samples, np.asarray(rewards, np.float64))
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
        """Logs a warning and keeps it in the status."""
        logger.warning("%s", message)
        others = [note for note in self._status.notes if note != message]
        self._status.notes = [*others, message][-MAX_NOTES:]

    def generated(self, sample: Sample) -> None:
        self.last_progress = time.monotonic()
        self._generated_tokens += sample.num_generated
        self._status.interrupted_samples += sample.num_interrupts > 0

    def batch_selected(
        self, batch: SendBatch, rewards: np.ndarray, advantages: np.ndarray, waited_s: float
    ) -> None:
        """`rewards`, `advantages`: [groups, samples]. `waited_s`: how long the trainer waited."""
        version = batch.version
        trained = [
            TrainedGroup(
                group_id=group.group_id,
                prompt_id=group.prompt.prompt_id,
                samples=[sample for sample in group.samples if sample is not None],
                rewards=rewards[g].tolist(),
                turn_rewards=group.turn_rewards,
                advantages=advantages[g].tolist(),
            )
            for g, group in enumerate(batch.groups)
        ]
        self._record(self._log.write_samples, version, trained)
        self._show_batch(version, [s for group in trained for s in group.samples], rewards)
        self._waited_s = self._step_stats["perf/time/wait_for_batch_s"] = waited_s

    def _show_batch(self, version: int, samples: list[Sample], rewards: np.ndarray) -> None:
        status = self._status
        runs = [run for sample in samples for run in sample.version_runs()]
        tokens = sum(count for _, count in runs)
        late = sum((version - v) * count for v, count in runs)
        status.staleness_mean = late / tokens if tokens else 0.0
        status.staleness_max = max((version - v for v, _ in runs), default=0)
        status.staleness_worst = max(status.staleness_max, status.staleness_worst or 0)
        status.reward_mean = float(rewards.mean())

    def dropped(self, group_id: int, reason: str) -> None:
        """Counts a dropped group; logs the first one of each reason."""
        if reason not in self._reasons_seen:
            self._reasons_seen.add(reason)
            logger.info("group %d dropped: %s; more are counted at each step", group_id, reason)
        self._dropped[reason] += 1

    def _estimate_end(self) -> None:
        status = self._status
        if self._step_times:
            status.eta_s = (status.steps - status.version) * float(np.mean(self._step_times))

    def step_done(self, version: int, stats: dict[str, float]) -> StepReported:
        """Returns the figures of the step that a restarted controller needs."""
        now = time.monotonic()
        self.last_progress = now
        step_s = max(now - self._last_step, 1e-9)  # a report may wait for a restarted controller
        self._last_step = now
        self._step_times.append(step_s)
        status = self._status
        status.version = version
        status.step_s = step_s
        self._estimate_end()
        if status.reward_mean is not None:
            status.reward_history.append(status.reward_mean)
        status.train_wait_fraction = self._waited_s / step_s
        status.generate_tokens_per_s = rate = self._generated_tokens / step_s
        status.reward_all_mean = stats.get("reward/all_mean")
        status.mfu = stats.get("perf/mfu")
        status.trainer_memory_gib = stats.get("perf/trainer_peak_memory_gib")
        self._step_stats |= stats | {
            "perf/time/step_s": step_s,
            "perf/generate_tokens_per_s": rate,
            "perf/generate_tokens_per_gpu_s": rate / self._num_gpus,
            "perf/trainer_wait_fraction": status.train_wait_fraction,
        }
        if (tokens := stats.get("train/tokens")) is not None:
            busy_s = stats["perf/time/proximal_s"] + stats["perf/time/train_s"]
            status.train_tokens_per_s = rate = tokens / step_s
            self._step_stats["perf/train_tokens_per_s"] = rate
            self._step_stats["perf/train_tokens_per_gpu_s"] = rate / self._num_gpus
            self._step_stats["perf/trainer_busy_tokens_per_s"] = tokens / busy_s
        self._step_stats |= {
            f"ledger/{name.replace('.', '_')}": count for name, count in self.ledger.items()
        }
        self._step_stats |= _drops_by_kind(self._dropped)
        self._record(self._log.write_scalars, version, self._step_stats)
        waited_s = self._waited_s
        dropped = ", ".join(f"{count} {reason}" for reason, count in self._dropped.items())
        self._step_stats, self._generated_tokens, self._waited_s = {}, 0, 0.0
        self._dropped.clear()
        state = ", ".join(f"{name} {count}" for name, count in self.ledger.items())
        reward_mean = math.nan if status.reward_mean is None else status.reward_mean
        mean = status.reward_all_mean
        scored = "none" if mean is None else f"{mean:.3f}"
        logger.info(
            "step %d/%d: reward %.3f (all scored groups %s), staleness mean %.2f max %d "
            "(worst %d), loss %.4f, step %.1f s, waited %.1f s; dropped since the last step: %s; "
            "ledger: %s",
            version, status.steps, reward_mean, scored,
            status.staleness_mean, status.staleness_max, status.staleness_worst,
            stats.get("train/loss", math.nan), step_s, waited_s, dropped or "none", state,
        )  # fmt: skip
        return StepReported(version, reward_mean, step_s)

    def record(self, version: int, stats: dict[str, float]) -> None:
        """Writes figures of a step that is reported already."""
        self._record(self._log.write_scalars, version, stats)

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

    def evaluated(self, version: int, results: list[EvaluationResult]) -> None:
        """Shows the results of all sets at a version."""
        self._status.evals += results
        scalars = {
            f"eval/{result.set}/{metric}": value
            for result in results
            for metric, value in result.metrics.items()
        }
        self._record(self._log.write_scalars, version, scalars)
        logger.info("evaluation of version %d:\n%s", version, evaluation_table(results))

    def write(self, fleet: Fleet, engines: Mapping[str, dict[str, float]] | None = None) -> None:
        """Writes status.json. `engines`: the servers' own figures, by worker."""
        status = self._status
        status.state, status.message, status.ledger = self.state, self.message, self.ledger
        status.lost, status.evaluating = self.lost, self.evaluating
        if self.training and status.step_s is None:  # until a step gives the rate
            seconds = time.monotonic() - self._last_step
            status.generate_tokens_per_s = self._generated_tokens / seconds
        status.fleet = [
            _server_status(worker, (engines or {}).get(worker.name, {}))
            for worker in fleet.rollout.values()
        ]
        if self.state not in FINAL_STATES:  # after a restart, until they join again
            missing = [name for name in self._server_names if name not in fleet.rollout]
            status.fleet += [ServerStatus(name, "not connected", -1, 0) for name in missing]
        self._record(self._log.write_status, status)

    def end(self, state: RunState, message: str, ledger: dict[str, int]) -> None:
        self.state, self.message, self.ledger = state, message, ledger
        self.write(Fleet())

    def _record(self, write: Callable[..., None], *values: Any) -> None:
        """Writes a log; a full disk costs log entries and never the run."""
        try:
            write(*values)
        except OSError as e:
            if self._write_error != str(e):
                logger.error("%s could not write: %s; the run continues", write.__name__, e)
            self._write_error = str(e)


def _drops_by_kind(dropped: Counter[str]) -> dict[str, float]:
    """Returns the number of groups that were too old, failed, or were left out by a filter."""
    stale = dropped[DropReason.STALE.value]
    failed = sum(dropped[reason.value] for reason in FAILURES)
    return {
        "drops/stale_groups": stale,
        "drops/failed_groups": failed,
        "drops/filtered_groups": dropped.total() - stale - failed,
    }


def _server_status(worker: RolloutWorker, engine: dict[str, float]) -> ServerStatus:
    queued = engine.get("queued_requests")
    return ServerStatus(
        worker.name,
        worker.state.value,
        worker.version,
        worker.load,
        None if queued is None else int(queued),
        engine.get("kv_use_fraction"),
        engine.get("cache_hit_fraction"),
        engine.get("decode_tokens_per_s"),
    )
