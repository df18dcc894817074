"""Notices a run that cannot learn: no group passes the filters, or rewards are all equal.

Without a batch no step is trained, but generation continues, so the limit run.no_progress_timeout_s
does not apply. A warning therefore names the reasons early, and the run ends after
faults.max_filtered_groups groups in a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from megatron_async_rl import hooks
from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.core.groups import DropReason
from megatron_async_rl.controller.journal.events import (
    BatchSelected,
    GroupDropped,
    JournalEvent,
    SampleScored,
)
from megatron_async_rl.errors import Error

FILTERS = {
    reason.value
    for reason in (DropReason.EQUAL_REWARDS, DropReason.SUCCESS_RATE, DropReason.FILTERED)
}
WARN_SHARE = 16  # of the limit, after which the warning comes
WARN_S, WARN_GROUPS = 120.0, 8  # it comes at this time, too, if groups are slow
WARN_STEPS = 3  # without learning signal
# The statistic of a step that is 0 if all advantages of an estimator are 0, too.
SPREAD = dict.fromkeys(("grpo", "dr_grpo", "rloo"), "reward/group_std_mean") | {
    "reinforce_pp": "reward/all_std"
}
MIN_SPREAD = 1e-12  # less is rounding

Warn = Callable[[str], None]


class SignalMonitor:
    """Takes the journal events of a run, and the statistics of each step."""

    def __init__(self, config: Config) -> None:
        self._limit = config.faults.max_filtered_groups
        estimator = config.algorithm.advantage.estimator
        self._is_custom = hooks.is_custom(estimator)
        self._spread = "reward/all_std" if self._is_custom else SPREAD.get(estimator, "")
        self._num_ready = 0
        self._equal_steps = 0  # in a row, without learning signal
        self._begin_row()

    def _begin_row(self) -> None:
        self._dropped: Counter[str] = Counter()  # by reason, since the last group that passed
        self._reward_sum, self._num_rewards = 0.0, 0  # meanwhile
        self._since: float | None = None
        self._warned = False

    def saw(self, event: JournalEvent) -> None:
        if isinstance(event, SampleScored):
            self._reward_sum += event.reward
            self._num_rewards += 1
        elif isinstance(event, GroupDropped) and event.reason in FILTERS:
            self._dropped[event.reason] += 1
        elif isinstance(event, BatchSelected):
            self._begin_row()

    def check(self, num_ready: int, now: float, warn: Warn) -> None:
        """Warns, and raises Error at the limit. `num_ready`: groups that wait for a batch."""
        if num_ready > self._num_ready:
            self._begin_row()
        self._num_ready = num_ready
        if not (total := self._dropped.total()):
            return
        self._since = now if self._since is None else self._since
        if total >= self._limit:
            raise Error(
                f"{self._found(total)}, and the run would never train a step "
                f"(faults.max_filtered_groups = {self._limit:,}); {_REMEDY}"
            )
        slow = now - self._since > WARN_S and total >= WARN_GROUPS
        if not self._warned and (slow or total >= max(self._limit // WARN_SHARE, 1)):
            self._warned = True
            warn(
                f"{self._found(total)}; the run ends at {self._limit:,} in a row "
                f"(faults.max_filtered_groups); {_REMEDY}"
            )

    def check_step(self, stats: dict[str, float], warn: Warn) -> None:
        """Warns when the groups of several steps had no learning signal."""
        if self._spread not in stats:
            return
        self._equal_steps = self._equal_steps + 1 if stats[self._spread] < MIN_SPREAD else 0
        if self._equal_steps == WARN_STEPS:
            effect = "their advantages are 0, and nothing is learned from them"
            if self._is_custom:
                effect = "an estimator that compares samples makes advantages of 0 of them"
            warn(
                f"all samples that the estimator compares had the same reward in {WARN_STEPS} "
                f"steps (mean {stats['reward/all_mean']:.3f}): {effect}; {_REMEDY}"
            )

    def _found(self, total: int) -> str:
        shares = ", ".join(
            f"{reason} {count / total:.0%}" for reason, count in self._dropped.most_common()
        )
        mean = self._reward_sum / max(self._num_rewards, 1)
        return (
            f"algorithm.filters dropped {total:,} groups in a row ({shares}; mean reward "
            f"{mean:.3f}) and none passed"
        )


_REMEDY = (
    "check the reward function on a few responses, use prompts that the model solves sometimes, "
    "raise algorithm.samples_per_prompt, or change algorithm.filters"
)
