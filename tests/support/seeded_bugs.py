"""Bugs that systems like this one have had; the simulation must find each of them.

A bug takes a MonkeyPatch and breaks one decision of the core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_async_rl.controller.core.actions import Action
from megatron_async_rl.controller.core.batch_selection import BatchSelector
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.groups import DropReason, Group, GroupState
from megatron_async_rl.controller.core.index import RunningGroups
from megatron_async_rl.controller.core.inputs import BatchRequested
from megatron_async_rl.controller.core.leases import Leases
from megatron_async_rl.controller.core.scoring import ScoringQueue
from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.controller.journal.events import (
    AnyEvent,
    BatchSelected,
    BatchTrained,
    JournalEvent,
    LeaseGranted,
    SampleReturned,
    SampleScored,
)
from megatron_async_rl.protocol.messages import Generated, StepDone
from megatron_async_rl.protocol.types import Prompt, Sample

Bug = Callable[[pytest.MonkeyPatch], None]
BUGS: list[Bug] = []


def bug(break_core: Bug) -> Bug:
    BUGS.append(break_core)
    return break_core


@bug
def no_fencing(patch: pytest.MonkeyPatch) -> None:
    """Accepts every reply for a group that exists."""

    def group_of(self: Leases, worker: str, reply: Any) -> Group | None:
        group = self._state.groups.get(reply.key.group_id)
        return group if group is not None and reply.key.index < len(group.samples) else None

    patch.setattr(Leases, "group_of", group_of)


@bug
def no_sweep(patch: pytest.MonkeyPatch) -> None:
    """Trains samples that are too old when the batch is selected."""
    patch.setattr(BatchSelector, "stale_groups", lambda self: [])


@bug
def newest_version_counts(patch: pytest.MonkeyPatch) -> None:
    """Selects groups by their newest token instead of their oldest."""
    newest = property(
        lambda self: max(
            (s.newest_version for s in self.samples if s is not None), default=self.floor_version
        )
    )
    for method in ("stale_groups", "select"):
        patch_while(
            patch,
            BatchSelector,
            method,
            lambda inner: inner.setattr(Group, "oldest_version", newest),
        )


@bug
def loses_in_flight(patch: pytest.MonkeyPatch) -> None:
    """Loses the samples that were at workers during a crash."""

    def enqueue_unscored(self: ScoringQueue, group: Group) -> None:
        if group.missing:
            self._state.forget(group)

    patch.setattr(ScoringQueue, "enqueue_unscored", enqueue_unscored)


@bug
def counter_not_restored(patch: pytest.MonkeyPatch) -> None:
    """Resumes with a count of trained groups of 0, so admission starts over (AReaL #1388)."""
    original = Core.restore

    def restore(self: Core, events: list[AnyEvent]) -> None:
        original(self, events)
        self.state.ledger.admitted -= self.state.ledger.trained
        self.state.ledger.trained = 0

    patch.setattr(Core, "restore", restore)


@bug
def drops_oldest_when_full(patch: pytest.MonkeyPatch) -> None:
    """Bounds the buffer by removing the oldest ready group without a record."""
    original = Core._complete

    def complete(self: Core, group: Group, answer: str = "") -> list[Action]:
        ready = self.state.in_state(GroupState.READY)
        if len(ready) > self.settings.prompts_per_step:
            self.state.forget(ready[0])
        return original(self, group, answer)

    patch.setattr(Core, "_complete", complete)


@bug
def commits_after_training(patch: pytest.MonkeyPatch) -> None:
    """Records the batch when its step is done instead of before it is sent."""
    original = ControllerState.record

    def record(self: ControllerState, event: JournalEvent) -> None:
        if isinstance(event, BatchSelected):
            self.late = event
            self._apply(event)
            return
        if isinstance(event, BatchTrained):
            self.recorded.append(self.late)
        original(self, event)

    patch.setattr(ControllerState, "record", record)


@bug
def forgets_training(patch: pytest.MonkeyPatch) -> None:
    """Does not record StepDone."""
    original = ControllerState.record
    patch.setattr(
        ControllerState,
        "record",
        lambda self, event: (
            self._apply(event) if isinstance(event, BatchTrained) else original(self, event)
        ),
    )


@bug
def selects_incomplete_groups(patch: pytest.MonkeyPatch) -> None:
    """Makes a group ready with its first score."""
    original = ControllerState._apply_to_group

    def apply_to_group(self: ControllerState, group: Group, event: Any) -> None:
        original(self, group, event)
        if isinstance(event, SampleScored):
            self.move(group, GroupState.READY)

    patch.setattr(ControllerState, "_apply_to_group", apply_to_group)


@bug
def no_admission_limit(patch: pytest.MonkeyPatch) -> None:
    """Admits without regard to max_staleness."""
    patch.setattr(Leases, "next_step", 0)


@bug
def own_version_admits(patch: pytest.MonkeyPatch) -> None:
    """Admits by the trainer's version instead of the server's: one more batch in flight."""
    for method in ("lease_queued", "admit"):
        original = getattr(Leases, method)

        def lease(
            self: Leases, *values: Any, original: Callable = original, **named: Any
        ) -> list[Action]:
            workers = list(self._fleet.rollout.values())
            true = [worker.version for worker in workers]
            for worker in workers:
                worker.version = max(worker.version, self._state.version + 1)
            try:
                return original(self, *values, **named)
            finally:
                for worker, version in zip(workers, true, strict=True):
                    worker.version = version

        patch.setattr(Leases, method, lease)


@bug
def ignores_lost_reward_worker(patch: pytest.MonkeyPatch) -> None:
    """Neither requeues the requests of a lost reward worker nor gives them a deadline."""
    assign = ScoringQueue.assign
    patch.setattr(ScoringQueue, "requeue_from", lambda self, worker: None)
    patch.setattr(ScoringQueue, "assign", lambda self, now: assign(self, 1e12))


@bug
def no_lease_deadline(patch: pytest.MonkeyPatch) -> None:
    """Waits forever for a lost message."""
    patch.setattr(RunningGroups, "take_expired", lambda self, now: [])


@bug
def new_batch_on_replay(patch: pytest.MonkeyPatch) -> None:
    """Sends a restarted trainer a new batch instead of the recorded one."""
    original = Core._batch_requested

    def batch_requested(self: Core, event: BatchRequested, now: float) -> list[Action]:
        if event.version <= self.version and self.state.in_batch:
            for group in self.state.in_batch:
                self.state.move(group, GroupState.READY)
            self.state.in_batch = []
        return original(self, event, now)

    patch.setattr(Core, "_batch_requested", batch_requested)


@bug
def counts_replayed_steps(patch: pytest.MonkeyPatch) -> None:
    """Counts StepDone again for a version that was trained before."""
    original = Core._step_done

    def step_done(self: Core, worker: str, step: StepDone, now: float) -> list[Action]:
        if step.version <= self.version:
            self.state.ledger.trained += self.settings.prompts_per_step
            return []
        return original(self, worker, step, now)

    patch.setattr(Core, "_step_done", step_done)


@bug
def prompts_start_over(patch: pytest.MonkeyPatch) -> None:
    """Resumes the prompt stream at its start."""
    original = ControllerState._apply_admitted

    def apply_admitted(self: ControllerState, event: Any) -> None:
        source, self._next_prompt = (
            self._next_prompt,
            lambda: Prompt(event.prompt_id, np.arange(2, dtype=np.int32), {}),
        )
        original(self, event)
        self._next_prompt = source

    patch.setattr(ControllerState, "_apply_admitted", apply_admitted)


@bug
def sample_taken_twice(patch: pytest.MonkeyPatch) -> None:
    """Records a duplicate of a sample again."""
    original = Core._generated

    def generated(self: Core, worker: str, reply: Generated, now: float) -> list[Action]:
        group = self.state.groups.get(reply.key.group_id)
        if (
            group is not None
            and reply.key.epoch == self.epoch
            and group.samples[reply.key.index] is not None
        ):
            self.state.record(SampleReturned(group.group_id, reply.key.index, reply.sample))
            return []
        return original(self, worker, reply, now)

    patch.setattr(Core, "_generated", generated)


@bug
def trusts_any_version(patch: pytest.MonkeyPatch) -> None:
    """Accepts tokens of a version that does not exist yet; partial samples count as fresh."""
    original = ControllerState._apply_to_group

    def apply_to_group(self: ControllerState, group: Group, event: Any) -> None:
        original(self, group, event)
        if isinstance(event, LeaseGranted):
            group.floor_version = self.version
        if isinstance(event, SampleReturned):
            group.samples[event.index] = relabelled(event.sample, self.version + 1)

    patch.setattr(Leases, "fault", lambda self, group, sample: "")
    patch.setattr(ControllerState, "_apply_to_group", apply_to_group)


@bug
def drop_unrecorded(patch: pytest.MonkeyPatch) -> None:
    """Drops a group without recording the reason."""

    def drop(self: Core, group: Group, reason: DropReason) -> list[Action]:
        self.state.forget(group)
        return []

    patch.setattr(Core, "_drop", drop)


def patch_while(patch: pytest.MonkeyPatch, owner: type, method: str, break_core: Bug) -> None:
    """Breaks the core only while this method runs."""
    original = getattr(owner, method)

    def patched(self: object, *values: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            break_core(inner)
            return original(self, *values)

    patch.setattr(owner, method, patched)


def relabelled(sample: Sample, version: int) -> Sample:
    versions = sample.versions.copy()
    versions[sample.generated] = version
    return Sample(
        ids=sample.ids,
        logprobs=sample.logprobs,
        versions=versions,
        stop=sample.stop,
        text=sample.text,
    )
