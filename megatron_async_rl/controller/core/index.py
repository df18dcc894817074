"""Indexes over the groups of one state: an event costs O(log n) instead of a scan of all groups.

state.py keeps one index per state; a group enters and leaves it when its state changes.
"""

from __future__ import annotations

import heapq
from collections import UserDict

from megatron_async_rl.controller.core.groups import Group
from megatron_async_rl.protocol.types import Purpose


class LazyHeap:
    """Ids ordered by a key. An outdated entry (id removed, or key changed) is skipped when met."""

    def __init__(self) -> None:
        self._keys: dict[int, float] = {}
        self._entries: list[tuple[float, int]] = []  # (key, id), a heap

    def put(self, id_: int, key: float) -> None:
        """Adds an id, or changes its key."""
        if self._keys.get(id_) == key:
            return
        self._keys[id_] = key
        heapq.heappush(self._entries, (key, id_))
        if len(self._entries) > 2 * len(self._keys) + 64:  # mostly skipped ones
            self._entries = [(key, id_) for id_, key in self._keys.items()]
            heapq.heapify(self._entries)

    def discard(self, id_: int) -> None:
        self._keys.pop(id_, None)

    def first(self) -> tuple[float, int] | None:
        """Returns (key, id) with the least key, then the least id."""
        entries = self._entries
        while entries and self._keys.get(entries[0][1]) != entries[0][0]:
            heapq.heappop(entries)
        return entries[0] if entries else None


class GroupIndex(UserDict[int, Group]):
    """The groups of one state by id, and the oldest token version among the training groups."""

    def __init__(self) -> None:
        super().__init__()
        self._by_age = LazyHeap()

    def __setitem__(self, group_id: int, group: Group) -> None:
        super().__setitem__(group_id, group)
        self.changed(group)

    def __delitem__(self, group_id: int) -> None:
        super().__delitem__(group_id)
        self._by_age.discard(group_id)

    def changed(self, group: Group) -> None:
        """Updates the index after the group's oldest_version has changed."""
        if group.purpose == "train":
            self._by_age.put(group.group_id, group.oldest_version)

    def has_older_than(self, version: int) -> bool:
        """Returns whether a training group has a token older than `version`."""
        first = self._by_age.first()
        return first is not None and first[0] < version


class QueuedGroups(GroupIndex):
    """Queued groups, also by purpose and number of missing samples; neither changes in a queue."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[tuple[Purpose, int], LazyHeap] = {}  # each in admission order
        self._line_of: dict[int, LazyHeap] = {}

    def __setitem__(self, group_id: int, group: Group) -> None:
        super().__setitem__(group_id, group)
        line = self._lines.setdefault((group.purpose, len(group.missing)), LazyHeap())
        self._line_of[group_id] = line
        line.put(group_id, group_id)

    def __delitem__(self, group_id: int) -> None:
        super().__delitem__(group_id)
        self._line_of.pop(group_id).discard(group_id)

    def next(self, room: int, purpose: Purpose) -> Group | None:
        """Returns the group of this purpose admitted first that misses at most `room` samples."""
        found = [
            first
            for (line_purpose, num_missing), line in self._lines.items()
            if num_missing <= room and line_purpose == purpose and (first := line.first())
        ]
        return self[min(found)[1]] if found else None


class RunningGroups(GroupIndex):
    """Running groups, also by worker and by the deadline of their lease.

    A group's worker changes only outside of this index.
    """

    def __init__(self) -> None:
        super().__init__()
        self._by_worker: dict[str, dict[int, Group]] = {}
        self._by_deadline = LazyHeap()

    def __setitem__(self, group_id: int, group: Group) -> None:
        super().__setitem__(group_id, group)
        self._by_worker.setdefault(group.worker, {})[group_id] = group

    def __delitem__(self, group_id: int) -> None:
        worker = self[group_id].worker
        super().__delitem__(group_id)
        self._by_deadline.discard(group_id)
        del self._by_worker[worker][group_id]
        if not self._by_worker[worker]:
            del self._by_worker[worker]

    def set_deadline(self, group_id: int, deadline: float) -> None:
        self._by_deadline.put(group_id, deadline)

    def take_expired(self, now: float) -> list[Group]:
        """Returns the groups that miss samples at their deadline, in admission order; each once."""
        expired = []
        while (first := self._by_deadline.first()) and first[0] < now:
            group = self[first[1]]
            self._by_deadline.discard(group.group_id)
            if group.missing:
                expired.append(group)
        return sorted(expired, key=lambda group: group.group_id)

    def of(self, worker: str) -> list[Group]:
        """Returns the groups that this worker runs, in admission order."""
        groups = self._by_worker.get(worker, {})
        return [groups[group_id] for group_id in sorted(groups)]
