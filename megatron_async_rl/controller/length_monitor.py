"""Are long answers starved? The lengths of what was sampled against what was trained and what was dropped.

A bound on staleness costs long answers first: they take longest, so they are the oldest at the cut,
and the first to run out of their lease. When they are not trained the policy learns to be brief for
no reason of the task. Two signs:

    mean length trained / sampled < MEAN_RATIO share of the longest tenth of the samples that was
    trained < TAIL_RATIO * the share of all samples that was, and by more than chance: 3 standard
    deviations, with the groups in that tenth as independent draws

What is still pending counts for neither; a sample that was cut off counts with the tokens that it
had.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_async_rl.controller.core.events import (
    BatchSelected,
    GroupDropped,
    JournalEvent,
    PartialSaved,
    SampleReturned,
)
from megatron_async_rl.controller.core.groups import DropReason

WINDOW = 128  # groups that a comparison looks back on, trained and dropped
MIN_GROUPS = 16  # fewer trained ones say nothing
MEAN_RATIO = 0.75
TAIL_RATIO = 0.5
_IGNORED = (
    DropReason.RUN_ENDED.value
)  # what is pending at the end is not a choice against long answers
_REMEDY = {
    DropReason.STALE: "set staleness.straggler_policy=wait, or raise staleness.max_staleness",
    DropReason.GENERATION_FAILED: "raise rollout.lease_timeout_s, or lower rollout.max_new_tokens",
    DropReason.POISON: "raise rollout.lease_timeout_s, or lower rollout.max_new_tokens",
    DropReason.REWARD_UNAVAILABLE: "see what the reward does with long answers",
    DropReason.EQUAL_REWARDS: "see whether long answers are all wrong (algorithm.filters.drop_equal_rewards drops such groups)",
    DropReason.SUCCESS_RATE: "see whether long answers are all wrong (algorithm.filters.success_rate_min drops such groups)",
}


@dataclass(frozen=True)
class _Ended:
    lengths: list[int]  # generated tokens, of each of its samples
    reason: str  # why it was dropped; empty: it was trained


class LengthMonitor:
    """Fed with the facts of a run; lengths are in generated tokens per sample."""

    def __init__(self) -> None:
        self._pending: dict[int, dict[int, int]] = {}  # group -> sample -> generated tokens so far
        self._ended: deque[_Ended] = deque(maxlen=WINDOW)
        self._num_ended = self._quiet_until = 0

    def saw(self, fact: JournalEvent) -> None:
        if isinstance(fact, SampleReturned):
            self._saw_tokens(fact.group_id, fact.index, fact.sample.num_generated)
        elif isinstance(fact, PartialSaved):
            self._saw_tokens(fact.group_id, fact.index, fact.partial.num_generated)
        elif isinstance(fact, BatchSelected):
            for group_id in fact.group_ids:
                self._end(group_id, "")
        elif isinstance(fact, GroupDropped):
            self._end(fact.group_id, fact.reason)

    def step(self) -> dict[str, float]:
        """Means, 90th percentiles, and the shares that were trained, for TensorBoard."""
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
        """Warns when long answers are starved, and again after so many groups that all are others than before."""
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
            f"long answers are starved: of the last {len(self._ended)} groups {share:.0%} of all samples were trained, but "
            f"{tail:.0%} of the longest tenth; {trained:.0f} tokens a sample trained, {sampled:.0f} sampled; {count} groups "
            f"were dropped as {reason}: {_REMEDY[DropReason(reason)]}"
        )

    def _groups_in_tail(self) -> int:
        longest = np.percentile(self._arrays()[0], 90)
        return sum(max(group.lengths) >= longest for group in self._ended)

    def _tokens_dropped(self, reason: str) -> int:
        return sum(sum(group.lengths) for group in self._ended if group.reason == reason)

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """[samples] lengths, and whether each was trained."""
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
