"""Statistics of all scores since the last step, before filters and batch selection drop groups.

`reward/mean` is of the trained groups alone: a filter that drops groups with equal rewards removes
what the policy always gets right. A group counts in the step in which its last sample is scored.
"""

from __future__ import annotations

import numpy as np

from megatron_async_rl.controller.core.events import (
    BatchSelected,
    GroupDropped,
    JournalEvent,
    SampleScored,
)
from megatron_async_rl.protocol.messages import ScoreResult

RIGHT, WRONG = 1.0, 0.0  # a sample is right with a reward of at least 1, wrong with at most 0


class ScoreMonitor:
    """Takes the journal events and the score results of a run."""

    def __init__(self, samples_per_prompt: int) -> None:
        self._samples_per_prompt = samples_per_prompt
        self._open: dict[int, list[float]] = {}  # group -> rewards so far
        self._groups: list[list[float]] = []  # rewards of the groups that were scored completely
        self._seconds: list[float] = []  # of each score
        self._num_errors = 0

    def saw(self, event: JournalEvent) -> None:
        if isinstance(event, SampleScored):
            rewards = self._open.setdefault(event.group_id, [])
            rewards.append(event.reward)
            if len(rewards) == self._samples_per_prompt:
                self._groups.append(self._open.pop(event.group_id))
        elif isinstance(event, GroupDropped):
            self._open.pop(event.group_id, None)
        elif isinstance(event, BatchSelected):  # some were scored before the controller restarted
            for group_id in event.group_ids:
                self._open.pop(group_id, None)

    def received(self, result: ScoreResult) -> None:
        if result.reward is None:
            self._num_errors += 1
        else:
            self._seconds.append(result.seconds)

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
        self._groups, self._seconds, self._num_errors = [], [], 0
        return stats
