"""Which groups are trained together, on which version: where staleness is bounded.

The cut takes the oldest groups first; what is older than eta is dropped before (`stale`). With `straggler: wait` it first
waits, bounded, for groups that this step's version would make stale. No more than B = prompts_per_step such groups can
exist (those started at version <= v - eta number at most (v + 1) * B, of which v * B are trained), so waiting always
suffices and drops nothing.

A batch leaves when all data-parallel leaders wait for it. A trainer that comes back from a checkpoint asks for versions
that were trained before: it gets the recorded batches again (CutBatch or Replay), changes nothing in the books, and ends
up where it was. So a crash un-trains nothing.
"""

from __future__ import annotations

from megatron_async_rl.controller.actions import CutBatch, Replay
from megatron_async_rl.controller.books import Books
from megatron_async_rl.controller.facts import Batched
from megatron_async_rl.controller.groups import Group, GroupState
from megatron_async_rl.controller.rules import Rules


class Cut:
    def __init__(self, rules: Rules, books: Books) -> None:
        self._rules = rules
        self._books = books
        self.leaders_want: dict[int, int] = {}  # data-parallel leader -> version it waits to train on
        self.wanted_since: float | None = None  # all leaders wait for the batch of the newest version

    def leader_joined(self, leader: int) -> None:
        """A new life of this leader: it has forgotten what it waited for."""
        self.leaders_want.pop(leader, None)
        self.wanted_since = None

    def wanted(self, leader: int, version: int, now: float) -> CutBatch | Replay | None:
        """A leader is ready to train on `version`, at most ours. The batch, where it was cut before."""
        self.leaders_want[leader] = version
        if list(self.leaders_want.values()).count(version) < self._rules.data_parallel_size:
            return None
        if version < self._books.version:
            self.leaders_want.clear()
            return Replay(version)
        if self._books.in_batch:
            self.leaders_want.clear()
            return CutBatch(version, self._books.in_batch)
        if self.wanted_since is None:
            self.wanted_since = now
        return None

    def stale(self) -> list[Group]:
        """Complete groups that may not be trained any more."""
        oldest_allowed = self._books.version - self._rules.eta
        return [group for group in self._ready() if group.oldest_version < oldest_allowed]

    def batch(self, now: float) -> CutBatch | None:
        """The oldest complete groups, when there are enough; none of them may be stale."""
        ready = self._ready()
        if len(ready) < self._rules.prompts_per_step or self._waits_for_straggler(now):
            return None
        ready.sort(key=lambda group: group.oldest_version)  # those of one version stay in order
        chosen = [group.group_id for group in ready[: self._rules.prompts_per_step]]
        self._books.record(Batched(self._books.version, chosen))
        self.wanted_since = None
        self.leaders_want.clear()
        return CutBatch(self._books.version, self._books.in_batch)

    def _ready(self) -> list[Group]:
        return self._books.in_state(GroupState.READY, purpose="train")

    def _waits_for_straggler(self, now: float) -> bool:
        assert self.wanted_since is not None
        if not self._rules.wait_for_stragglers or now - self.wanted_since > self._rules.straggler_wait_s:
            return False
        last_chance = self._books.version - self._rules.eta  # would be stale under version + 1
        unfinished = self._books.in_state(GroupState.QUEUED, GroupState.RUNNING, purpose="train")
        return any(group.oldest_version <= last_chance for group in unfinished)
