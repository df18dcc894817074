"""Bugs put in on purpose, each of which must show in the simulation: mistakes that systems like this one have made.

A bug takes a MonkeyPatch and spoils one decision of the core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_async_rl.controller.core.actions import Action
from megatron_async_rl.controller.core.batch_selection import BatchSelector
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.events import (
    AnyEvent,
    BatchSelected,
    BatchTrained,
    JournalEvent,
    LeaseGranted,
    SampleReturned,
    SampleScored,
)
from megatron_async_rl.controller.core.groups import Group, GroupState
from megatron_async_rl.controller.core.leases import Leases
from megatron_async_rl.controller.core.ledger import DropReason
from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.controller.core.verdicts import Verdicts
from megatron_async_rl.protocol.messages import Generated
from megatron_async_rl.protocol.types import Prompt, Sample

Bug = Callable[[pytest.MonkeyPatch], None]
BUGS: list[Bug] = []


def bug(spoil: Bug) -> Bug:
    BUGS.append(spoil)
    return spoil


@bug
def no_fencing(patch: pytest.MonkeyPatch) -> None:
    """Takes whatever comes for a group that exists."""

    def group_of(self: Leases, worker: str, reply: Any) -> Group | None:
        group = self._state.groups.get(reply.key.group_id)
        return group if group is not None and reply.key.index < len(group.samples) else None

    patch.setattr(Leases, "group_of", group_of)


@bug
def no_sweep(patch: pytest.MonkeyPatch) -> None:
    """Trains what is too old at the cut."""
    patch.setattr(BatchSelector, "stale", lambda self: [])


@bug
def newest_version_counts(patch: pytest.MonkeyPatch) -> None:
    """Judges a group at the cut by its freshest token."""
    newest = property(
        lambda self: max(
            (s.newest_version for s in self.samples if s is not None), default=self.floor_version
        )
    )
    for method in ("stale", "batch"):
        spoil_while(
            patch,
            BatchSelector,
            method,
            lambda inner: inner.setattr(Group, "oldest_version", newest),
        )


@bug
def loses_in_flight(patch: pytest.MonkeyPatch) -> None:
    """After a crash, what was out with workers is gone."""

    def owe_unjudged(self: Verdicts, group: Group) -> None:
        if group.missing:
            self._state.forget(group)

    patch.setattr(Verdicts, "owe_unjudged", owe_unjudged)


@bug
def counter_not_restored(patch: pytest.MonkeyPatch) -> None:
    """Resumes with an empty count of trained groups, so admission starts over (AReaL #1388)."""
    right = Core.restore

    def restore(self: Core, facts: list[AnyEvent]) -> None:
        right(self, facts)
        self.ledger.admitted -= self.ledger.trained
        self.ledger.trained = 0

    patch.setattr(Core, "restore", restore)


@bug
def drops_oldest_when_full(patch: pytest.MonkeyPatch) -> None:
    """A bounded buffer that lets the oldest ready group fall out, unrecorded."""
    right = Core._complete

    def complete(self: Core, group: Group) -> list[Action]:
        ready = self.state.in_state(GroupState.READY)
        if len(ready) > self.rules.prompts_per_step:
            self.state.forget(ready[0])
        return right(self, group)

    patch.setattr(Core, "_complete", complete)


@bug
def commits_after_training(patch: pytest.MonkeyPatch) -> None:
    """The batch is recorded when its step is done, not before it is sent."""
    right = ControllerState.record

    def record(self: ControllerState, fact: JournalEvent) -> None:
        if isinstance(fact, BatchSelected):
            self.late = fact
            self._apply(fact)
            return
        if isinstance(fact, BatchTrained):
            self.facts.append(self.late)
        right(self, fact)

    patch.setattr(ControllerState, "record", record)


@bug
def forgets_training(patch: pytest.MonkeyPatch) -> None:
    """StepDone is not recorded."""
    right = ControllerState.record
    patch.setattr(
        ControllerState,
        "record",
        lambda self, fact: (
            self._apply(fact) if isinstance(fact, BatchTrained) else right(self, fact)
        ),
    )


@bug
def cuts_incomplete(patch: pytest.MonkeyPatch) -> None:
    """A group is ready with its first verdict."""
    right = ControllerState._apply_to_group

    def apply_to_group(self: ControllerState, group: Group, fact: Any) -> None:
        right(self, group, fact)
        if isinstance(fact, SampleScored):
            self.move(group, GroupState.READY)

    patch.setattr(ControllerState, "_apply_to_group", apply_to_group)


@bug
def no_admission_limit(patch: pytest.MonkeyPatch) -> None:
    """eta does not throttle."""
    patch.setattr(Leases, "next_step", 0)


@bug
def own_version_admits(patch: pytest.MonkeyPatch) -> None:
    """Admission goes by the trainer's version, where only the server's counts: one more batch in flight."""
    for method in ("lease_queued", "admit"):
        right = getattr(Leases, method)

        def lease(
            self: Leases, *values: Any, right: Callable = right, **named: Any
        ) -> list[Action]:
            workers = list(self._fleet.rollout.values())
            true = [worker.version for worker in workers]
            for worker in workers:
                worker.version = max(worker.version, self._state.version + 1)
            try:
                return right(self, *values, **named)
            finally:
                for worker, version in zip(workers, true, strict=True):
                    worker.version = version

        patch.setattr(Leases, method, lease)


@bug
def ignores_lost_judge(patch: pytest.MonkeyPatch) -> None:
    """A verdict that a dead judge owed is never asked of another, and has no deadline."""
    ask = Verdicts.ask
    patch.setattr(Verdicts, "take_back", lambda self, judge: None)
    patch.setattr(Verdicts, "ask", lambda self, now: ask(self, 1e12))


@bug
def no_lease_deadline(patch: pytest.MonkeyPatch) -> None:
    """A lost message is waited for for ever."""
    patch.setattr(Leases, "overdue", lambda self, now: [])


@bug
def new_batch_on_replay(patch: pytest.MonkeyPatch) -> None:
    """A trainer that comes back gets whatever is fresh instead of the recorded batch."""
    right = Core.batch_wanted

    def batch_wanted(self: Core, leader: int, version: int, now: float) -> list[Action]:
        if version <= self.version and self.state.in_batch:
            for group in self.state.in_batch:
                self.state.move(group, GroupState.READY)
            self.state.in_batch = []
        return right(self, leader, version, now)

    patch.setattr(Core, "batch_wanted", batch_wanted)


@bug
def counts_replayed_steps(patch: pytest.MonkeyPatch) -> None:
    """StepDone of a version that was trained before counts again."""
    right = Core.step_done

    def step_done(self: Core, version: int, now: float) -> list[Action]:
        if version <= self.version:
            self.ledger.trained += self.rules.prompts_per_step
            return []
        return right(self, version, now)

    patch.setattr(Core, "step_done", step_done)


@bug
def prompts_start_over(patch: pytest.MonkeyPatch) -> None:
    """Resumes the prompt stream at its beginning."""
    right = ControllerState._apply_admitted

    def apply_admitted(self: ControllerState, fact: Any) -> None:
        source, self._next_prompt = (
            self._next_prompt,
            lambda: Prompt(fact.prompt_id, np.arange(2, dtype=np.int32), {}),
        )
        right(self, fact)
        self._next_prompt = source

    patch.setattr(ControllerState, "_apply_admitted", apply_admitted)


@bug
def sample_taken_twice(patch: pytest.MonkeyPatch) -> None:
    """A duplicate of a sample is recorded again."""
    right = Core.generated

    def generated(self: Core, worker: str, reply: Generated, now: float) -> list[Action]:
        group = self.groups.get(reply.key.group_id)
        if (
            group is not None
            and reply.key.epoch == self.epoch
            and group.samples[reply.key.index] is not None
        ):
            self.state.record(SampleReturned(group.group_id, reply.key.index, reply.sample))
            return []
        return right(self, worker, reply, now)

    patch.setattr(Core, "generated", generated)


@bug
def trusts_any_version(patch: pytest.MonkeyPatch) -> None:
    """Takes tokens of a version that no weights have, without a look; partials count as fresh."""
    right = ControllerState._apply_to_group

    def apply_to_group(self: ControllerState, group: Group, fact: Any) -> None:
        right(self, group, fact)
        if isinstance(fact, LeaseGranted):
            group.floor_version = self.version
        if isinstance(fact, SampleReturned):
            group.samples[fact.index] = relabelled(fact.sample, self.version + 1)

    patch.setattr(Leases, "fault", lambda self, group, sample: "")
    patch.setattr(ControllerState, "_apply_to_group", apply_to_group)


@bug
def drop_unrecorded(patch: pytest.MonkeyPatch) -> None:
    """A dropped group is forgotten without a reason."""

    def drop(self: Core, group: Group, reason: DropReason) -> list[Action]:
        self.state.forget(group)
        return []

    patch.setattr(Core, "_drop", drop)


def spoil_while(patch: pytest.MonkeyPatch, owner: type, method: str, spoil: Bug) -> None:
    """The bug is there only while this method runs."""
    right = getattr(owner, method)

    def spoiled(self: object, *values: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            spoil(inner)
            return right(self, *values)

    patch.setattr(owner, method, spoiled)


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
