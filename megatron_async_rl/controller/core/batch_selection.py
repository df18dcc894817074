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

from megatron_async_rl.controller.core.actions import ResendBatch, SendBatch
from megatron_async_rl.controller.core.events import BatchSelected
from megatron_async_rl.controller.core.groups import Group, GroupState
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.controller.core.state import ControllerState


class BatchSelector:
    def __init__(self, rules: CoreSettings, state: ControllerState) -> None:
        self._settings = rules
        self._state = state
        self.leaders_want: dict[
            int, int
        ] = {}  # data-parallel leader -> version it waits to train on
        self.wanted_since: float | None = (
            None  # all leaders wait for the batch of the newest version
        )

    def leader_joined(self, leader: int) -> None:
        """A new life of this leader: it has forgotten what it waited for."""
        self.leaders_want.pop(leader, None)
        self.wanted_since = None

    def wanted(self, leader: int, version: int, now: float) -> SendBatch | ResendBatch | None:
        """A leader is ready to train on `version`, at most ours. The batch, where it was cut before."""
        self.leaders_want[leader] = version
        if list(self.leaders_want.values()).count(version) < self._settings.data_parallel_size:
            return None
        if version < self._state.version:
            self.leaders_want.clear()
            return ResendBatch(version)
        if self._state.in_batch:
            self.leaders_want.clear()
            return SendBatch(version, self._state.in_batch)
        if self.wanted_since is None:
            self.wanted_since = now
        return None

    def stale(self) -> list[Group]:
        """Complete groups that may not be trained any more."""
        oldest_allowed = self._state.version - self._settings.max_staleness
        return [group for group in self._ready() if group.oldest_version < oldest_allowed]

    def batch(self, now: float) -> SendBatch | None:
        """The oldest complete groups, when there are enough; none of them may be stale."""
        ready = self._ready()
        if len(ready) < self._settings.prompts_per_step or self._waits_for_straggler(now):
            return None
        ready.sort(key=lambda group: group.oldest_version)  # those of one version stay in order
        chosen = [group.group_id for group in ready[: self._settings.prompts_per_step]]
        self._state.record(BatchSelected(self._state.version, chosen))
        self.wanted_since = None
        self.leaders_want.clear()
        return SendBatch(self._state.version, self._state.in_batch)

    def _ready(self) -> list[Group]:
        return self._state.in_state(GroupState.READY, purpose="train")

    def _waits_for_straggler(self, now: float) -> bool:
        assert self.wanted_since is not None
        if (
            not self._settings.wait_for_stragglers
            or now - self.wanted_since > self._settings.straggler_timeout_s
        ):
            return False
        last_chance = (
            self._state.version - self._settings.max_staleness
        )  # would be stale under version + 1
        unfinished = self._state.in_state(GroupState.QUEUED, GroupState.RUNNING, purpose="train")
        return any(group.oldest_version <= last_chance for group in unfinished)
