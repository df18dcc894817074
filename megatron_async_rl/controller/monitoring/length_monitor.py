"""Detects starved long answers by the lengths of sampled, trained and dropped answers.

A staleness bound hits long answers first: they take longest, so they are the oldest when a batch is
selected and the first to exceed their lease. If they are not trained, the policy learns to answer
briefly although the task does not ask for it. Warns if one of these holds:

    mean length trained / sampled < MEAN_RATIO
    trained share of the longest tenth of samples < TAIL_RATIO * trained share of all samples, and
    lower by more than 3 standard deviations, the groups in that tenth being independent draws

Pending groups do not count; a sample that was cut off counts with the tokens that it had.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_async_rl.controller.core.groups import DropReason
from megatron_async_rl.controller.journal.events import (
    BatchSelected,
    GroupDropped,
    JournalEvent,
    PartialSaved,
    SampleReturned,
)

WINDOW = 128  # most recent trained and dropped groups that are compared
MIN_GROUPS = 16  # trained groups that a comparison needs
MEAN_RATIO = 0.75
TAIL_RATIO = 0.5
_IGNORED = DropReason.RUN_ENDED.value  # groups pending at the end were not selected by length
_REMEDY = {
    DropReason.STALE: "set staleness.straggler_policy=wait, or raise staleness.max_staleness",
    DropReason.GENERATION_FAILED: "raise rollout.lease_timeout_s, or lower rollout.max_new_tokens",
    DropReason.POISON: "raise rollout.lease_timeout_s, or lower rollout.max_new_tokens",
    DropReason.REWARD_UNAVAILABLE: "check the reward function on long answers",
    DropReason.EQUAL_REWARDS: "check whether long answers are all wrong "
    "(algorithm.filters.drop_equal_rewards drops such groups)",
    DropReason.SUCCESS_RATE: "check whether long answers are all wrong "
    "(algorithm.filters.success_rate_min drops such groups)",
    DropReason.FILTERED: "check whether algorithm.filters.function rejects long answers",
}


@dataclass(frozen=True)
class _Ended:
    lengths: list[int]  # generated tokens of each sample
    reason: str  # why it was dropped; empty if it was trained


class LengthMonitor:
    """Takes the journal events of a run; lengths are generated tokens per sample."""

    def __init__(self) -> None:
        self._pending: dict[int, dict[int, int]] = {}  # group -> sample -> generated tokens so far
        self._ended: deque[_Ended] = deque(maxlen=WINDOW)
        self._num_ended = self._quiet_until = 0

    def saw(self, event: JournalEvent) -> None:
        if isinstance(event, SampleReturned):
            self._saw_tokens(event.group_id, event.index, event.sample.num_generated)
        elif isinstance(event, PartialSaved):
            self._saw_tokens(event.group_id, event.index, event.partial.num_generated)
        elif isinstance(event, BatchSelected):
            for group_id in event.group_ids:
                self._end(group_id, "")
        elif isinstance(event, GroupDropped):
            self._end(event.group_id, event.reason)

    def step(self) -> dict[str, float]:
        """Returns means, 90th percentiles and trained shares, for TensorBoard."""
        stats = {}
        lengths, trained = self._arrays()
        for kind, these in (
            ("sampled", lengths),
            ("trained", lengths[trained]),
            ("dropped", lengths[~trained]),
        ):
            if these.size:
                stats[f"rollout/{kind}_tokens_mean"] = float(these.mean())
                stats[f"rollout/{kind}_tokens_p90"] = float(np.percentile(these, 90))
        if lengths.size:
            longest = lengths >= np.percentile(lengths, 90)
            stats["rollout/trained_fraction"] = float(trained.mean())
            stats["rollout/longest_tenth_trained_fraction"] = float(trained[longest].mean())
        return stats

    def check(self, warn: Callable[[str], None]) -> None:
        """Warns if long answers are starved, at most once per WINDOW groups."""
        if self._num_ended >= self._quiet_until and (starved := self._starved()):
            warn(starved)
            self._quiet_until = self._num_ended + WINDOW

    def _starved(self) -> str:
        if sum(not group.reason for group in self._ended) < MIN_GROUPS:
            return ""
        stats = self.step()
        sampled, trained = (
            stats["rollout/sampled_tokens_mean"],
            stats["rollout/trained_tokens_mean"],
        )
        share, tail = (
            stats["rollout/trained_fraction"],
            stats["rollout/longest_tenth_trained_fraction"],
        )
        chance = 3 * math.sqrt(share * (1 - share) / self._groups_in_tail())
        if trained >= MEAN_RATIO * sampled and tail >= min(TAIL_RATIO * share, share - chance):
            return ""
        reasons = Counter(group.reason for group in self._ended if group.reason)
        reason, count = max(reasons.items(), key=lambda item: self._tokens_dropped(item[0]))
        return (
            f"long answers are starved: of the last {len(self._ended)} groups {share:.0%} of all "
            f"samples were trained, but {tail:.0%} of the longest tenth; {trained:.0f} tokens per "
            f"trained sample, {sampled:.0f} per sampled one; {count} groups dropped as {reason}: "
            f"{_REMEDY[DropReason(reason)]}"
        )

    def _groups_in_tail(self) -> int:
        longest = np.percentile(self._arrays()[0], 90)
        return sum(max(group.lengths) >= longest for group in self._ended)

    def _tokens_dropped(self, reason: str) -> int:
        return sum(sum(group.lengths) for group in self._ended if group.reason == reason)

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lengths and whether each was trained, [samples] each."""
        lengths = [length for group in self._ended for length in group.lengths]
        trained = [not group.reason for group in self._ended for _ in group.lengths]
        return np.asarray(lengths, np.int64), np.asarray(trained, bool)

    def _saw_tokens(self, group_id: int, index: int, count: int) -> None:
        self._pending.setdefault(group_id, {})[index] = count

    def _end(self, group_id: int, reason: str) -> None:
        lengths = self._pending.pop(group_id, {})
        if lengths and reason != _IGNORED:
            self._num_ended += 1
            self._ended.append(_Ended(list(lengths.values()), reason))
