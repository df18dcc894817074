"""Selects the groups of a batch and the version that they train: here staleness is bounded.

The oldest groups are selected first, after those older than max_staleness were dropped. With
straggler_policy = wait, selection first waits, bounded, for groups that the next version would make
stale. At most B = prompts_per_step such groups can exist (at most (v + 1) * B groups were started
at version <= v - max_staleness, and v * B of them are trained), so waiting always suffices and
drops nothing.

A new batch is selected when all data-parallel leaders have requested it. From then on it is
recorded, and a leader that requests it gets it again (SendBatch or ResendBatch): its connection
broke, or the trainer restarted from a checkpoint. That changes nothing in the ledger, and the
trainer ends up with the same weights.
"""

from __future__ import annotations

from megatron_async_rl.controller.core.actions import ResendBatch, SendBatch
from megatron_async_rl.controller.core.groups import Group, GroupState
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.controller.journal.events import BatchSelected


class BatchSelector:
    def __init__(self, settings: CoreSettings, state: ControllerState) -> None:
        self._settings = settings
        self._state = state
        self.requests: dict[int, int] = {}  # data-parallel leader -> requested version
        self.requested_since: float | None = None  # since all leaders wait for a new batch

    def leader_joined(self, leader: int) -> None:
        """Forgets the request of a restarted leader."""
        self.requests.pop(leader, None)
        self.requested_since = None

    def request(self, leader: int, version: int, now: float) -> SendBatch | ResendBatch | None:
        """Returns the batch for this leader if it is recorded; otherwise notes the request.

        A recorded batch does not wait for the other leaders, which may have their shares. The
        version may be that of the step in progress, whose report is still to come: the first rank,
        a leader too, sends it before its own request.
        """
        only_this = frozenset({leader})
        if version < self._state.version:
            return ResendBatch(version, only_this)
        if version == self._state.version and self._state.in_batch:
            return SendBatch(version, self._state.in_batch, only_this)
        self.requests[leader] = version
        self.note_waiting(now)
        return None

    def note_waiting(self, now: float) -> None:
        """Begins the wait for a new batch if all leaders have requested it."""
        wanted = list(self.requests.values())
        all_wait = wanted.count(self._state.version) >= self._settings.data_parallel_size
        if all_wait and self.requested_since is None:
            self.requested_since = now

    def stale_groups(self) -> list[Group]:
        """Returns the complete groups that may not be trained any more."""
        oldest_allowed = self._state.version - self._settings.max_staleness
        if not self._state.ready.has_older_than(oldest_allowed):
            return []
        return [group for group in self._ready() if group.oldest_version < oldest_allowed]

    def select(self, now: float) -> SendBatch | None:
        """Selects the oldest complete groups if there are enough. Drop the stale ones before."""
        num_groups = self._settings.prompts_per_step
        if len(self._state.ready) < num_groups or self._waits_for_straggler(now):
            return None
        ready = self._ready()
        ready.sort(key=lambda group: group.oldest_version)  # stable: admission order in a version
        chosen = [group.group_id for group in ready[:num_groups]]
        self._state.record(BatchSelected(self._state.version, chosen))
        self.requested_since = None
        self.requests.clear()
        all_leaders = frozenset(range(self._settings.data_parallel_size))
        return SendBatch(self._state.version, self._state.in_batch, all_leaders)

    def _ready(self) -> list[Group]:
        return self._state.in_state(GroupState.READY, purpose="train")

    def _waits_for_straggler(self, now: float) -> bool:
        assert self.requested_since is not None
        waited_s = now - self.requested_since
        if not self._settings.wait_for_stragglers or waited_s > self._settings.straggler_timeout_s:
            return False
        last_chance = self._state.version - self._settings.max_staleness  # stale at version + 1
        unfinished = (self._state.queued, self._state.running)
        return any(groups.has_older_than(last_chance + 1) for groups in unfinished)
