"""What must survive a crash: the facts of a run, each written once to the journal and never changed.

The core records a fact for every change of what it may not forget; applied in order to an empty core they rebuild
it (Core.restore), through the very methods that first made the change. Leases, load and liveness are no facts: a new life of the
controller starts without workers, and its epoch fences whatever the old one had given out.
"""

from __future__ import annotations

from typing import Union

import msgspec

from megatron_async_rl.protocol.types import Partial, Sample


class JournalEvent(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all facts; the tag in the journal is the class name."""


class ControllerStarted(JournalEvent, frozen=True):
    """A life of the controller. Its messages carry this epoch."""

    epoch: int


class GroupAdmitted(JournalEvent, frozen=True):
    """The next prompt of the stream became a group. The n-th of these facts is the n-th prompt."""

    group_id: int
    prompt_id: str


class LeaseGranted(JournalEvent, frozen=True):
    group_id: int
    attempt: int
    worker: str
    floor_version: int


class LeaseFailed(JournalEvent, frozen=True):
    """A lease came to an end with samples missing."""

    group_id: int
    worker: str


class PartialSaved(JournalEvent, frozen=True):
    """What a sample had when an update or a shutdown interrupted it."""

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


class BatchSelected(JournalEvent, frozen=True):
    """These groups are the batch that is trained on `version`, now and in every replay."""

    version: int
    group_ids: list[int]


class BatchTrained(JournalEvent, frozen=True):
    """The batch of version - 1 is in the weights."""

    version: int


class GroupDropped(JournalEvent, frozen=True):
    """A group is dropped, for a ledger.DropReason."""

    group_id: int
    reason: str


class EvaluationFinished(JournalEvent, frozen=True):
    version: int
    accuracy: float
    num: int


AnyEvent = Union[
    ControllerStarted, GroupAdmitted, LeaseGranted, LeaseFailed, PartialSaved, SampleReturned, SampleScored, BatchSelected, BatchTrained, GroupDropped, EvaluationFinished
]  # fmt: skip
