"""A training group: the samples of one prompt, and where they stand."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from megatron_async_rl.protocol.types import Partial, Prompt, Purpose, Sample


class GroupState(enum.Enum):
    QUEUED = "queued"
    RUNNING = "running"
    READY = "ready"
    IN_BATCH = "in batch"


@dataclass
class Group:
    """The samples of one prompt, and where they stand."""

    group_id: int
    prompt: Prompt
    purpose: Purpose
    samples: list[Sample | None]
    rewards: list[float | None]
    state: GroupState = GroupState.QUEUED
    attempt: int = 0  # leases so far: what is returned under an earlier one is fenced
    failed_on: list[str] = field(default_factory=list)  # workers of the leases that came to nothing
    partials: dict[int, Partial] = field(default_factory=dict)  # of missing samples
    worker: str = ""
    deadline: float = 0.0
    floor_version: int = 0  # no token of the running samples is older
    oldest_returned: int | None = (
        None  # of the samples that are back; kept, as looking it up reads every token
    )
    verdict_attempts: dict[int, int] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        return [index for index, sample in enumerate(self.samples) if sample is None]

    @property
    def is_judged(self) -> bool:
        return all(reward is not None for reward in self.rewards)

    @property
    def oldest_version(self) -> int:
        """The oldest version any token has or, while samples are out, may turn out to have."""
        if self.oldest_returned is None or (
            self.missing and self.floor_version < self.oldest_returned
        ):
            return self.floor_version
        return self.oldest_returned
