"""Stores of a partial sample only the tokens since the one before, and joins them when read.

A sample that k weight updates interrupt is saved k times; the journal holds its tokens once.
"""

from __future__ import annotations

import msgspec
import numpy as np

from megatron_async_rl.controller.journal.events import (
    AnyEvent,
    BatchSelected,
    GroupDropped,
    JournalEvent,
    PartialSaved,
    SampleReturned,
)
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import Partial

_ARRAYS = ("ids", "logprobs", "versions")
_Key = tuple[int, int]  # group, index


class PartialTail(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The stored form of a PartialSaved that continues the one before of the same sample."""

    group_id: int
    index: int
    num_kept: int  # tokens of the one before, all of them
    tail: Partial


StoredEvent = AnyEvent | PartialTail


class Partials:
    """The newest partial of each unfinished sample, as of the events so far."""

    def __init__(self) -> None:
        self._saved: dict[_Key, Partial] = {}
        self._of_group: dict[int, set[_Key]] = {}

    def to_store(self, events: list[JournalEvent]) -> list[JournalEvent | PartialTail]:
        """Returns the stored form of consecutive events. Changes nothing; see `saw`."""
        before = dict[_Key, Partial]()
        stored: list[JournalEvent | PartialTail] = []
        for event in events:
            if isinstance(event, PartialSaved):
                key = (event.group_id, event.index)
                stored.append(_shorten(event, before.get(key) or self._saved.get(key)))
                before[key] = event.partial
            else:
                stored.append(event)
        return stored

    def read(self, stored: StoredEvent) -> AnyEvent:
        """Returns the event. Raises DataError if the partial that it continues is missing."""
        event: AnyEvent = self._join(stored) if isinstance(stored, PartialTail) else stored
        self.saw(event)
        return event

    def saw(self, event: JournalEvent) -> None:
        """Notes an event that is stored."""
        if isinstance(event, PartialSaved):
            key = (event.group_id, event.index)
            self._saved[key] = event.partial
            self._of_group.setdefault(event.group_id, set()).add(key)
        elif isinstance(event, SampleReturned):
            self._saved.pop((event.group_id, event.index), None)
        elif isinstance(event, GroupDropped | BatchSelected):
            ended = event.group_ids if isinstance(event, BatchSelected) else [event.group_id]
            for group_id in ended:
                for key in self._of_group.pop(group_id, ()):
                    self._saved.pop(key, None)

    def _join(self, stored: PartialTail) -> PartialSaved:
        before = self._saved.get((stored.group_id, stored.index))
        if before is None or len(before.ids) != stored.num_kept:
            raise DataError(f"the first {stored.num_kept} tokens of a partial sample are missing")
        arrays = {
            name: np.concatenate([getattr(before, name), getattr(stored.tail, name)])
            for name in (*_ARRAYS, "experts")
        }
        return PartialSaved(stored.group_id, stored.index, Partial(**arrays))


def _shorten(event: PartialSaved, before: Partial | None) -> PartialSaved | PartialTail:
    if before is None:
        return event
    num_kept, after = len(before.ids), event.partial
    for name in _ARRAYS:
        if not np.array_equal(getattr(before, name), getattr(after, name)[:num_kept]):
            return event  # sampled again from the start
    num_experts = len(before.experts)
    if num_experts * len(after.ids) != len(after.experts) * num_kept or not np.array_equal(
        before.experts, after.experts[:num_experts]
    ):
        return event
    tail = Partial(
        **{name: getattr(after, name)[num_kept:] for name in _ARRAYS},
        experts=after.experts[num_experts:],
    )
    return PartialTail(event.group_id, event.index, num_kept, tail)
