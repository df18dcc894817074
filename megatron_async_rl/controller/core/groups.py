"""A training group (the samples of one prompt), and the ledger over all groups of a run:

    admitted = trained + sum(dropped) + pending

`pending` is counted from the groups in memory, so a group that is lost or counted twice is noticed.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_async_rl.errors import LedgerError
from megatron_async_rl.protocol.types import Partial, Prompt, Purpose, Sample

EvaluationMode = Literal["pause", "held_server", "mixed"]


@dataclass(frozen=True)
class EvaluationTask:
    """One sample of an evaluation: the `index`-th of a prompt of a set."""

    set_name: str
    prompt: Prompt
    index: int
    max_new_tokens: int
    temperature: float
    truncation: dict[str, Any] = field(default_factory=dict)  # top_p, top_k, min_p

    @property
    def key(self) -> tuple[str, str, int]:
        return self.set_name, self.prompt.prompt_id, self.index


class GroupState(enum.Enum):
    QUEUED = "queued"
    RUNNING = "running"
    READY = "ready"
    IN_BATCH = "in batch"


@dataclass
class Group:
    group_id: int
    prompt: Prompt
    purpose: Purpose
    samples: list[Sample | None]
    rewards: list[float | None]
    turn_rewards: dict[int, list[float]] = field(default_factory=dict)
    """Rewards of turns by index, for samples in which not only the last turn has one."""
    state: GroupState = GroupState.QUEUED
    attempt: int = 0  # number of leases so far; replies under an earlier one are fenced
    failed_on: list[str] = field(default_factory=list)  # the workers of the failed leases
    partials: dict[int, Partial] = field(default_factory=dict)  # by index, of missing samples
    worker: str = ""
    floor_version: int = 0  # lower bound on the token versions of the running samples
    oldest_returned: int | None = None  # of the returned samples; cached, it reads every token
    task: EvaluationTask | None = None  # of an evaluation
    exact_version: int | None = None  # of all tokens; None: any that max_staleness allows

    @property
    def missing(self) -> list[int]:
        """Indices of the samples that have not returned."""
        return [index for index, sample in enumerate(self.samples) if sample is None]

    @property
    def is_scored(self) -> bool:
        return all(reward is not None for reward in self.rewards)

    @property
    def oldest_version(self) -> int:
        """Lower bound on the token versions; exact when all samples have returned."""
        if self.oldest_returned is None:
            return self.floor_version
        if self.missing:
            return min(self.floor_version, self.oldest_returned)
        return self.oldest_returned


class DropReason(enum.Enum):
    """Every way in which an admitted group can end without being trained."""

    STALE = "stale"  # exceeded max_staleness when a batch was selected
    GENERATION_FAILED = "generation_failed"  # max_attempts leases failed on one server
    POISON = "poison"  # max_attempts leases failed on several servers: the prompt is suspected
    REWARD_UNAVAILABLE = "reward_unavailable"  # scoring failed reward.max_attempts times
    EQUAL_REWARDS = "equal_rewards"  # no learning signal (algorithm.filters.drop_equal_rewards)
    SUCCESS_RATE = "success_rate"  # outside algorithm.filters.success_rate_min and _max
    FILTERED = "filtered"  # algorithm.filters.function returned False
    RUN_ENDED = "run_ended"  # still pending when the last step was done


FAILURES = (DropReason.GENERATION_FAILED, DropReason.POISON, DropReason.REWARD_UNAVAILABLE)


class Ledger:
    def __init__(self) -> None:
        self.admitted = 0
        self.trained = 0
        self.dropped: Counter[DropReason] = Counter()

    @property
    def claimed(self) -> int:
        """Groups that are trained or may still be: each takes a place in a batch."""
        return self.admitted - self.dropped.total()

    def check(self, pending: int) -> None:
        """Raises LedgerError unless admitted = trained + dropped + pending."""
        if self.claimed != self.trained + pending:
            reasons = {reason.value: count for reason, count in self.dropped.items()}
            raise LedgerError(
                f"the ledger does not balance: admitted {self.admitted} != trained {self.trained} "
                f"+ dropped {self.dropped.total()} {reasons} + pending {pending}; "
                "a group was lost or counted twice"
            )

    def table(self, pending: int) -> dict[str, int]:
        """Returns the ledger as flat numbers, for the log, TensorBoard and status.json."""
        dropped = {f"dropped.{r.value}": self.dropped[r] for r in DropReason if self.dropped[r]}
        return {"admitted": self.admitted, "trained": self.trained, **dropped, "pending": pending}
