"""Are long answers starved? The lengths of what was sampled against what was trained and what was dropped.

A bound on staleness costs long answers first: they take longest, so they are the oldest at the cut. When the trained
ones are much shorter than the sampled ones the policy learns to be brief for no reason of the task.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import chain

import numpy as np

from megatron_async_rl.controller.facts import Batched, Closed, Fact, Returned

WINDOW = 64  # groups of each kind that a comparison looks back on
MIN_GROUPS = 16  # fewer say nothing
ALARM_RATIO = 0.75  # mean length trained / sampled below which people are warned
_IGNORED = ("run_ended",)  # what is pending at the end is not a choice against long answers


class LengthMeter:
    """Fed with the facts of a run; lengths are in generated tokens per sample."""

    def __init__(self) -> None:
        self._pending: dict[int, list[int]] = {}  # group -> lengths of its samples so far
        self._recent = {kind: deque[list[int]](maxlen=WINDOW) for kind in ("sampled", "trained", "dropped")}
        self._alarmed = False

    def saw(self, fact: Fact) -> None:
        if isinstance(fact, Returned):
            lengths = self._pending.setdefault(fact.group_id, [])
            lengths.append(fact.sample.num_generated)
        elif isinstance(fact, Batched):
            for group_id in fact.group_ids:
                self._end(group_id, "trained")
        elif isinstance(fact, Closed):
            if fact.reason in _IGNORED:
                self._pending.pop(fact.group_id, None)
            else:
                self._end(fact.group_id, "dropped")

    def step(self) -> dict[str, float]:
        """Means and 90th percentiles, for TensorBoard."""
        stats = {}
        for kind, groups in self._recent.items():
            if lengths := list(chain.from_iterable(groups)):
                stats[f"rollout/{kind}_tokens_mean"] = float(np.mean(lengths))
                stats[f"rollout/{kind}_tokens_p90"] = float(np.percentile(lengths, 90))
        return stats

    def check(self, warn: Callable[[str], None]) -> None:
        """Warns once when what is trained is much shorter than what is sampled."""
        stats, groups = self.step(), self._recent["trained"]
        if len(groups) < MIN_GROUPS or len(self._recent["sampled"]) < MIN_GROUPS:
            return
        sampled, trained = stats["rollout/sampled_tokens_mean"], stats["rollout/trained_tokens_mean"]
        starved = sampled > 0 and trained < ALARM_RATIO * sampled
        if starved and not self._alarmed:
            warn(
                f"long answers are starved: the last {len(groups)} trained groups have {trained:.0f} tokens a sample, all that "
                f"were sampled {sampled:.0f}; set staleness.straggler=wait, or raise staleness.eta"
            )
        self._alarmed = starved

    def _end(self, group_id: int, kind: str) -> None:
        lengths = self._pending.pop(group_id, [])
        if lengths:
            self._recent[kind].append(lengths)
            self._recent["sampled"].append(lengths)
