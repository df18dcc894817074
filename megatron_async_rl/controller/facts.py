"""What must survive a crash: the facts of a run, each written once to the journal and never changed.

The core records a fact for every change of what it may not forget; applied in order to an empty core they rebuild
it (Core.restore), through the very methods that first made the change. Leases, load and liveness are no facts: a new life of the
controller starts without workers, and its epoch fences whatever the old one had given out.
"""

from __future__ import annotations

from typing import Union

import msgspec

from megatron_async_rl.types import Partial, Sample


class Fact(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all facts; the tag in the journal is the class name."""


class Began(Fact, frozen=True):
    """A life of the controller. Its messages carry this epoch."""

    epoch: int


class Admitted(Fact, frozen=True):
    """The next prompt of the stream became a group. The n-th of these facts is the n-th prompt."""

    group_id: int
    prompt_id: str


class Leased(Fact, frozen=True):
    group_id: int
    attempt: int
    worker: str
    floor_version: int


class LeaseFailed(Fact, frozen=True):
    """A lease came to an end with samples missing."""

    group_id: int
    worker: str


class Kept(Fact, frozen=True):
    """What a sample had when an update or a shutdown interrupted it."""

    group_id: int
    index: int
    partial: Partial


class Returned(Fact, frozen=True):
    """A sample is complete."""

    group_id: int
    index: int
    sample: Sample


class Judged(Fact, frozen=True):
    group_id: int
    index: int
    reward: float


class Batched(Fact, frozen=True):
    """These groups are the batch that is trained on `version`, now and in every replay."""

    version: int
    group_ids: list[int]


class Trained(Fact, frozen=True):
    """The batch of version - 1 is in the weights."""

    version: int


class Closed(Fact, frozen=True):
    """A group is dropped, for a ledger.DropReason."""

    group_id: int
    reason: str


class Evaluated(Fact, frozen=True):
    version: int
    accuracy: float
    num: int


AnyFact = Union[
    Began, Admitted, Leased, LeaseFailed, Kept, Returned, Judged, Batched, Trained, Closed, Evaluated
]  # fmt: skip
