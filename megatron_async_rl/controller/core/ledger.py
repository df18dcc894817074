"""The books of a run: every admitted group is trained once, dropped for a named reason, or still pending.

    admitted = trained + sum(dropped) + pending

`pending` is counted from the groups that are really there, so a group that is lost or trained twice shows.
"""

from __future__ import annotations

import enum
from collections import Counter

from megatron_async_rl.errors import LedgerError


class DropReason(enum.Enum):
    """All the ways in which an admitted group may end untrained."""

    STALE = "stale"  # older than eta allows where the batch was cut
    GENERATION_FAILED = "generation_failed"  # max_attempts leases came to nothing
    POISON = "poison"  # the same, on several servers: the prompt itself is suspected, and kept out
    REWARD_UNAVAILABLE = (
        "reward_unavailable"  # the judge broke max_attempts times: never a reward of 0
    )
    EQUAL_REWARDS = (
        "equal_rewards"  # nothing to learn from, and algorithm.filters.drop_equal_rewards
    )
    SUCCESS_RATE = (
        "success_rate"  # too hard or too easy: outside algorithm.filters.success_rate_min and _max
    )
    RUN_ENDED = "run_ended"  # pending when the last step was done


class Ledger:
    def __init__(self) -> None:
        self.admitted = 0
        self.trained = 0
        self.dropped: Counter[DropReason] = Counter()

    @property
    def closed(self) -> int:
        """Groups that have reached their end."""
        return self.trained + self.dropped.total()

    @property
    def claimed(self) -> int:
        """Groups that are trained or may still be: each is a place in a batch."""
        return self.admitted - self.dropped.total()

    def check(self, pending: int) -> None:
        """Raises LedgerError unless the books balance."""
        if self.admitted != self.closed + pending:
            raise LedgerError(
                f"the ledger does not balance: admitted {self.admitted} != trained {self.trained} + dropped "
                f"{self.dropped.total()} {self._reasons()} + pending {pending}; a group was lost or counted twice"
            )

    def table(self, pending: int) -> dict[str, int]:
        """The books as flat numbers, for the log, TensorBoard and `status`."""
        dropped = {
            f"dropped.{reason.value}": self.dropped[reason]
            for reason in DropReason
            if self.dropped[reason]
        }
        return {"admitted": self.admitted, "trained": self.trained, **dropped, "pending": pending}

    def _reasons(self) -> str:
        return str({reason.value: count for reason, count in self.dropped.items()})
