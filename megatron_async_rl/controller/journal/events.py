"""Journal events: every change that must survive a restart of the controller, written once.

Applied in order to an empty state they rebuild it (Core.restore), with the methods that made the
changes. Load, liveness and assignments are not recorded: a restarted controller begins without
workers, and its epoch fences everything that was leased before.
"""

from __future__ import annotations

import msgspec

from megatron_async_rl.protocol.types import Partial, Sample


class JournalEvent(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all journal events; the stored tag is the class name."""


class ControllerStarted(JournalEvent, frozen=True):
    epoch: int
    max_staleness: int | None = None  # the setting of this start; older journals lack it


class GroupAdmitted(JournalEvent, frozen=True):
    """The next prompt of the stream became a group: the n-th of these is the n-th prompt."""

    group_id: int
    prompt_id: str


class LeaseGranted(JournalEvent, frozen=True):
    group_id: int
    attempt: int
    worker: str
    floor_version: int


class LeaseFailed(JournalEvent, frozen=True):
    """A lease ended with samples missing."""

    group_id: int
    worker: str


class PartialSaved(JournalEvent, frozen=True):
    """The tokens of a sample when an update or a shutdown interrupted it."""

    group_id: int
    index: int
    partial: Partial


class SampleReturned(JournalEvent, frozen=True):
    """A sample is complete."""

    group_id: int
    index: int
    sample: Sample


class SampleScored(JournalEvent, frozen=True):
    group_id: int
    index: int
    reward: float
    metrics: dict[str, float] = {}  # of the reward function
    turn_rewards: list[float] = []  # `reward` is their sum; empty: it is the last turn's


class BatchSelected(JournalEvent, frozen=True):
    """These groups are the batch trained on `version`, now and in every replay."""

    version: int
    group_ids: list[int]


class BatchTrained(JournalEvent, frozen=True):
    """The batch of version - 1 is in the weights."""

    version: int


class GroupDropped(JournalEvent, frozen=True):
    group_id: int
    reason: str  # value of a DropReason


class StepReported(JournalEvent, frozen=True):
    """Figures of the step to `version`, which the display of a restarted controller shows."""

    version: int
    reward_mean: float
    seconds: float  # since the step before


AnyEvent = (
    ControllerStarted | GroupAdmitted | LeaseGranted | LeaseFailed | PartialSaved | SampleReturned
    | SampleScored | BatchSelected | BatchTrained | GroupDropped | StepReported
)  # fmt: skip
