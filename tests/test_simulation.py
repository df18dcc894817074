"""A thousand whole runs on a virtual clock, each replayable by its seed; and bugs put in on purpose, each of which must show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from simulation import Breach, simulate

from megatron_async_rl.controller.core import Action, Core, Group, GroupState
from megatron_async_rl.controller.facts import Batched, Fact, Judged, Leased, Returned, Trained
from megatron_async_rl.controller.fleet import RolloutWorker
from megatron_async_rl.controller.ledger import DropReason
from megatron_async_rl.errors import ConservationError, Error
from megatron_async_rl.messages import Generated
from megatron_async_rl.types import Prompt, Sample

NUM_SEEDS = 1000
BUG_SEEDS = 150  # a bug must show within so many


def test_a_thousand_runs_keep_every_promise() -> None:
    total: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        try:
            result = simulate(seed)
        except (AssertionError, Error) as e:
            raise AssertionError(f"seed {seed}: {e}") from e
        total.update(faults=result.faults, crashes=result.crashes, dropped=result.dropped, trained=result.trained)
        total["stale"] = max(total["stale"], result.max_staleness)
    print(f"{NUM_SEEDS} seeds: {dict(total)}")
    assert total["faults"] > NUM_SEEDS and total["crashes"] > NUM_SEEDS  # the world was hostile
    assert total["trained"] > 10 * total["dropped"] / 5 and total["stale"] >= 3


def test_a_seed_plays_the_same_run_again() -> None:
    assert simulate(17) == simulate(17)


class NoFencing(Core):
    """Takes whatever comes for a group that exists."""

    def _leased_to(self, worker: str, message: object) -> Group | None:
        group = self.groups.get(message.group_id)
        return group if group is not None and message.index < len(group.samples) else None


class NoSweep(Core):
    """Trains what is too old at the cut."""

    def _drop(self, group: Group, reason: DropReason) -> list[Action]:
        return [] if reason is DropReason.STALE else super()._drop(group, reason)

    def _cut(self, now: float) -> list[Action]:
        eta, self.rules = self.rules.eta, replace(self.rules, eta=100)
        try:
            return super()._cut(now)
        finally:
            self.rules = replace(self.rules, eta=eta)


class NewestVersionCounts(Core):
    """Judges a group by its freshest token."""

    def _cut(self, now: float) -> list[Action]:
        original = Group.oldest_version
        Group.oldest_version = property(
            lambda self: max((s.newest_version for s in self.samples if s is not None), default=self.floor_version)
        )
        try:
            return super()._cut(now)
        finally:
            Group.oldest_version = original


class LosesInFlight(Core):
    """After a crash, what was out with workers is gone."""

    def _await_or_queue(self, group: Group) -> None:
        if group.missing:
            del self.groups[group.group_id]


class CounterNotRestored(Core):
    """Resumes with an empty count of trained groups, so admission starts over (AReaL #1388)."""

    def restore(self, facts: list[Fact]) -> None:
        super().restore(facts)
        self.ledger.admitted -= self.ledger.trained
        self.ledger.trained = 0


class DropsOldestWhenFull(Core):
    """A bounded buffer that lets the oldest ready group fall out, unrecorded."""

    def _complete(self, group: Group) -> list[Action]:
        ready = [g for g in self.groups.values() if g.state is GroupState.READY]
        if len(ready) > self.rules.prompts_per_step:
            del self.groups[ready[0].group_id]
        return super()._complete(group)


class CommitsAfterTraining(Core):
    """The batch is recorded when its step is done, not before it is sent."""

    def _record(self, fact: Fact) -> None:
        if isinstance(fact, Batched):
            self._late = fact
            self._apply(fact)
            return
        if isinstance(fact, Trained):
            self.facts.append(self._late)
        super()._record(fact)


class ForgetsTraining(Core):
    """StepDone is not recorded."""

    def _record(self, fact: Fact) -> None:
        self._apply(fact) if isinstance(fact, Trained) else super()._record(fact)


class CutsIncomplete(Core):
    """A group is ready with its first verdict."""

    def _apply_to_group(self, group: Group, fact: Fact) -> None:
        super()._apply_to_group(group, fact)
        if isinstance(fact, Judged):
            group.state = GroupState.READY


class NoAdmissionLimit(Core):
    """eta does not throttle."""

    @property
    def next_step(self) -> int:
        return 0


class OwnVersionAdmits(Core):
    """Admission goes by the trainer's version, where only the server's counts: one more batch in flight."""

    def _lease(self, now: float) -> list[Action]:
        for worker in self.fleet.rollout.values():
            worker.version, worker.true = max(worker.version, self.version + 1), worker.version
        try:
            return super()._lease(now)
        finally:
            for worker in self.fleet.rollout.values():
                worker.version = worker.true


class IgnoresLostJudge(Core):
    """A verdict that a dead judge owed is never asked of another, and has no deadline."""

    def worker_lost(self, name: str, now: float) -> list[Action]:
        if name in self.fleet.reward:
            del self.fleet.reward[name]
            return []
        return super().worker_lost(name, now)

    def _dispatch_scores(self, now: float) -> list[Action]:
        return super()._dispatch_scores(1e12)


class NoLeaseDeadline(Core):
    """A lost message is waited for for ever."""

    def _lease_to(self, server: RolloutWorker, group: Group, now: float) -> Action:
        action = super()._lease_to(server, group, now)
        group.deadline = float("inf")
        return action


class NewBatchOnReplay(Core):
    """A trainer that comes back gets whatever is fresh instead of the recorded batch."""

    def batch_wanted(self, leader: int, version: int, now: float) -> list[Action]:
        if version <= self.version and self._in_batch:
            for group in self._in_batch:
                group.state = GroupState.READY
            self._in_batch = []
        return super().batch_wanted(leader, version, now)


class CountsReplayedSteps(Core):
    """StepDone of a version that was trained before counts again."""

    def step_done(self, version: int, now: float) -> list[Action]:
        if version <= self.version:
            self.ledger.trained += self.rules.prompts_per_step
            return []
        return super().step_done(version, now)


class PromptsStartOver(Core):
    """Resumes the prompt stream at its beginning."""

    def _apply_admitted(self, fact: Fact) -> None:
        source, self._next_prompt = self._next_prompt, lambda: Prompt(fact.prompt_id, np.arange(2, dtype=np.int32), {})
        super()._apply_admitted(fact)
        self._next_prompt = source


class SampleTakenTwice(Core):
    """A duplicate of a sample is recorded again."""

    def generated(self, worker: str, message: Generated, now: float) -> list[Action]:
        group = self.groups.get(message.group_id)
        if group is not None and message.epoch == self.epoch and group.samples[message.index] is not None:
            self._record(Returned(group.group_id, message.index, message.sample))
            return []
        return super().generated(worker, message, now)


class TrustsAnyVersion(Core):
    """Takes tokens of a version that no weights have, without a look; partials count as fresh."""

    def _is_whole(self, group: Group, sample: Sample) -> bool:
        return True

    def _apply_to_group(self, group: Group, fact: Fact) -> None:
        super()._apply_to_group(group, fact)
        if isinstance(fact, Leased):
            group.floor_version = self.version
        if isinstance(fact, Returned):
            group.samples[fact.index] = _relabelled(fact.sample, self.version)


class DropUnrecorded(Core):
    """A dropped group is forgotten without a reason."""

    def _drop(self, group: Group, reason: DropReason) -> list[Action]:
        del self.groups[group.group_id]
        return []


def _relabelled(sample: Sample, version: int) -> Sample:
    versions = sample.versions.copy()
    versions[sample.generated] = version + 1
    return Sample(ids=sample.ids, logprobs=sample.logprobs, versions=versions, stop=sample.stop, text=sample.text)


BUGS = [
    NoFencing, NoSweep, NewestVersionCounts, LosesInFlight, CounterNotRestored, DropsOldestWhenFull,
    CommitsAfterTraining, ForgetsTraining, CutsIncomplete, NoAdmissionLimit, OwnVersionAdmits, IgnoresLostJudge,
    NoLeaseDeadline, NewBatchOnReplay, CountsReplayedSteps, PromptsStartOver, SampleTakenTwice, TrustsAnyVersion,
    DropUnrecorded,
]  # fmt: skip


def first_breach(bug: type[Core], restore: Callable | None = None) -> str:
    """What the simulation says of the bug, and at which seed; empty when it never notices."""
    for seed in range(BUG_SEEDS):
        try:
            simulate(seed, bug, restore)
        except (Breach, ConservationError, Error, KeyError, ValueError, TypeError) as e:
            return f"seed {seed}: {type(e).__name__}: {e}"
    return ""


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_seeded_bug_is_caught(bug: type[Core]) -> None:
    caught = first_breach(bug)
    print(f"{bug.__name__}: {caught}")
    assert caught, bug.__doc__


def test_a_torn_journal_is_caught() -> None:
    """Facts missing in the middle: not what a crash can leave, but what a bad copy of a file can."""
    assert first_breach(Core, lambda facts: facts[: len(facts) // 2] + facts[len(facts) // 2 + 3 :])
