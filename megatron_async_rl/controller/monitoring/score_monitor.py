"""Statistics of all scores since the last step, before filters and batch selection drop groups.

`reward/mean` is of the trained groups alone: a filter that drops groups with equal rewards removes
the prompts that the policy always solves. A group counts in the step in which its last sample is
scored.

Also warns of the first group that fails, with the error, and ends a run in which every group fails.
A reward function or workflow that always raises would otherwise drop groups without end, because no
batch is ever complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from megatron_async_rl.controller.core.groups import FAILURES, DropReason
from megatron_async_rl.controller.journal.events import (
    BatchSelected,
    GroupDropped,
    JournalEvent,
    SampleReturned,
    SampleScored,
)
from megatron_async_rl.errors import Error
from megatron_async_rl.observability.error_log import ErrorLog
from megatron_async_rl.protocol.messages import GenerateFailed, Message, ScoreResult
from megatron_async_rl.protocol.user_metrics import MAX_NAMES

logger = logging.getLogger(__name__)
RIGHT, WRONG = 1.0, 0.0  # a sample is right with a reward of at least 1, wrong with at most 0


class ScoreMonitor:
    """Takes the journal events of a run and the messages of its workers."""

    def __init__(self, samples_per_prompt: int, max_failed_groups: int) -> None:
        self._samples_per_prompt = samples_per_prompt
        self._max_failed_groups = max_failed_groups
        self._num_failed = 0  # groups since the last one that was scored completely
        self._last_error = ""
        self._reasons: dict[DropReason, bool] = {}  # of failed groups -> whether it was warned of
        self._errors = ErrorLog(logger)
        self._open: dict[int, list[float]] = {}  # group -> rewards so far
        self._groups: list[list[float]] = []  # rewards of the groups that were scored completely
        self._seconds: list[float] = []  # of each score
        self._num_errors = 0
        self._user_names: set[str] = set()
        self._user_values: dict[str, list[float]] = {}  # since the last step

    def saw(self, event: JournalEvent) -> None:
        if isinstance(event, SampleReturned):
            self._add_metrics(event.sample.metrics)
        elif isinstance(event, SampleScored):
            self._add_metrics(event.metrics)
            rewards = self._open.setdefault(event.group_id, [])
            rewards.append(event.reward)
            if len(rewards) == self._samples_per_prompt:
                self._groups.append(self._open.pop(event.group_id))
                self._num_failed = 0
        elif isinstance(event, GroupDropped):
            self._open.pop(event.group_id, None)
            if (reason := DropReason(event.reason)) in FAILURES:
                self._num_failed += 1
                self._reasons.setdefault(reason, False)
        elif isinstance(event, BatchSelected):  # some were scored before the controller restarted
            for group_id in event.group_ids:
                self._open.pop(group_id, None)

    def received(self, worker: str, message: Message) -> None:
        if isinstance(message, GenerateFailed):
            self._keep(f"{worker}: sample {message.key}", message.error)
        elif isinstance(message, ScoreResult) and message.reward is None:
            self.failed(f"{worker}: no score for sample {message.key}", message.error)
        elif isinstance(message, ScoreResult):
            self._seconds.append(message.seconds)

    def failed(self, where: str, error: str) -> None:
        """Counts an attempt to score that failed."""
        self._num_errors += 1
        self._keep(where, error)

    def check(self, warn: Callable[[str], None]) -> None:
        """Warns of the first failed group of each reason.

        Raises Error if faults.max_failed_groups groups have failed in a row.
        """
        error = self._last_error or "none was reported: no reply in time, or one that is refused"
        for reason in [reason for reason, warned in self._reasons.items() if not warned]:
            self._reasons[reason] = True
            warn(
                f"a group was dropped as {reason.value}, later ones are only counted; the last "
                f"error: {error.splitlines()[0]} (logs/controller.log has each different one)"
            )
        if self._num_failed >= self._max_failed_groups:
            raise Error(
                f"{self._num_failed} groups in a row could not be generated and scored "
                f"(faults.max_failed_groups = {self._max_failed_groups}); correct the workflow or "
                f"the reward function; the last error:\n{error}"
            )

    def _keep(self, where: str, error: str) -> None:
        self._last_error = f"{where}: {error}"
        self._errors.log(where, error)

    def _add_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name not in self._user_names:
                if len(self._user_names) == MAX_NAMES:
                    self._errors.log("user metrics", f"more than {MAX_NAMES} names in this run")
                    continue
                self._user_names.add(name)
            self._user_values.setdefault(name, []).append(value)

    def step(self) -> dict[str, float]:
        """Returns the statistics since the last call, for TensorBoard."""
        stats: dict[str, float] = {"reward/scoring_errors": self._num_errors}
        if self._groups:
            rewards = np.array(self._groups)  # [groups, samples]
            stats |= {
                "reward/all_mean": float(rewards.mean()),
                "reward/all_std": float(rewards.std()),
                "reward/group_std_mean": float(rewards.std(axis=1).mean()),
                "reward/all_right_fraction": float((rewards >= RIGHT).all(axis=1).mean()),
                "reward/all_wrong_fraction": float((rewards <= WRONG).all(axis=1).mean()),
                "reward/scored_groups": len(rewards),
            }
        if self._seconds:
            stats["reward/scoring_s_mean"] = float(np.mean(self._seconds))
            stats["reward/scoring_s_max"] = max(self._seconds)
        for name, values in self._user_values.items():
            stats[f"user/{name}"] = float(np.mean(values))
        self._user_values = {}
        self._groups, self._seconds, self._num_errors = [], [], 0
        return stats
