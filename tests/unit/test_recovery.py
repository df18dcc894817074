"""The controller's core is rebuilt from its journal after a crash at any point.

A state machine adds crashes of the controller and of the trainer to the faults of test_core.py.
"""

from __future__ import annotations

from core_builders import (
    finish_lease,
    generated,
    join_workers,
    make_core,
    make_partial,
    messages_of,
    restart_core,
)
from core_machine import CoreMachine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import Action, ReportStep, ResendBatch, SendBatch
from megatron_async_rl.controller.core.groups import GroupState
from megatron_async_rl.controller.journal.events import (
    BatchSelected,
    BatchTrained,
    GroupAdmitted,
    GroupDropped,
    JournalEvent,
)
from megatron_async_rl.protocol.messages import Generate, GenerateFailed, PartialSample, StepDone
from megatron_async_rl.protocol.types import NOT_GENERATED


def test_finished_and_partial_groups_survive_a_crash() -> None:
    core = make_core(max_staleness=1)
    first, second, *_ = join_workers(core)
    finish_lease(core, first, 0)
    core.handle(inputs.Received("rollout-0", generated(second, 0, 0)), 0)
    again = restart_core(core, core.state.take_events())
    assert again.epoch == core.epoch + 1
    assert again.state.groups[first.group_id].state is GroupState.READY
    assert again.state.groups[second.group_id].missing == [1]
    leases = join_workers(again)
    # no prompt is repeated or skipped
    assert [lease.group_id for lease in leases] == [
        second.group_id,
        2,
        3,
    ]
    assert leases[0].indices == [1] and leases[0].attempt == second.attempt + 1
    assert again.state.ledger.admitted == core.state.ledger.admitted == 4


def test_replies_to_leases_of_an_older_epoch_are_fenced() -> None:
    core = make_core()
    lease, *_ = join_workers(core)
    again = restart_core(core, core.state.take_events())
    join_workers(again)
    assert again.handle(inputs.Received("rollout-0", generated(lease, 0, 0)), 0) == []
    assert again.num_fenced_messages == 1


def test_restarted_controller_resends_the_same_batch() -> None:
    core = make_core(max_staleness=0)
    for lease in join_workers(core):
        finish_lease(core, lease, 0)
    [batch] = core.handle(inputs.BatchRequested(0, 0), 0)
    again = restart_core(core, core.state.take_events())
    [same] = again.handle(inputs.BatchRequested(0, 0), 0)
    assert isinstance(batch, SendBatch) and isinstance(same, SendBatch)
    assert [g.group_id for g in same.groups] == [g.group_id for g in batch.groups]
    again.handle(inputs.Received("trainer-0", StepDone(1, {})), 0)
    assert again.state.ledger.trained == 2


def test_trainer_from_a_checkpoint_gets_recorded_batches() -> None:
    core = make_core(max_staleness=0)
    for lease in join_workers(core):
        finish_lease(core, lease, 0)
    core.handle(inputs.BatchRequested(0, 0), 0)
    core.handle(inputs.Received("trainer-0", StepDone(1, {})), 0)
    core.handle(inputs.TrainerJoined(0), 0)
    assert core.handle(inputs.BatchRequested(0, 0), 0) == [ResendBatch(0, frozenset({0}))]
    replayed = core.handle(inputs.Received("trainer-0", StepDone(1, {})), 0)
    assert replayed == [ReportStep(1, None)]
    assert (core.version, core.state.ledger.trained, core.num_replayed_steps) == (1, 2, 1)


def test_report_that_is_repeated_is_no_progress() -> None:
    """The trainer repeats it while its weights wait for a server: the run has stalled."""
    core = make_core(max_staleness=0)
    for lease in join_workers(core):
        finish_lease(core, lease, 0)
    core.handle(inputs.BatchRequested(0, 0), 0)
    step = inputs.Received("trainer-0", StepDone(1, {}))
    core.handle(step, 0)
    assert core.handle(step, 0) == []
    assert (core.version, core.num_replayed_steps, core.num_fenced_messages) == (1, 0, 1)


def test_next_lease_carries_partial_tokens_unless_too_stale() -> None:
    core = make_core(prompts_per_step=1, max_staleness=1)
    lease, other = join_workers(core)
    for index in (0, 1):
        core.handle(
            inputs.Received("rollout-0", PartialSample(lease.key(index), make_partial(0, 0))), 0
        )
    again = restart_core(core, core.state.take_events())
    renewed, _ = join_workers(again)
    assert [p.versions.tolist() for p in renewed.partials] == [[NOT_GENERATED] * 3 + [0, 0]] * 2
    assert again.state.groups[lease.group_id].floor_version == 0
    assert other.partials == []


def test_sample_with_impossible_versions_is_refused() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = join_workers(core)
    [again] = messages_of(
        core.handle(inputs.Received("rollout-0", generated(lease, 0, 7)), 0), Generate
    )
    assert again.attempt == lease.attempt + 1 and core.num_fenced_messages == 1


def test_prompt_that_fails_on_several_servers_is_dropped_as_poison() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0, max_attempts=2)
    [_] = join_workers(core)
    core.handle(inputs.RolloutJoined("rollout-1", 100), 0)
    core.handle(inputs.ServerUpdated("rollout-1", version=0), 0)
    [again] = messages_of(core.handle(inputs.WorkerLost("rollout-0"), 0), Generate)
    core.handle(inputs.Received("rollout-1", GenerateFailed(again.key(0), "x")), 0)
    assert core.state.ledger.table(0)["dropped.poison"] == 1


def test_leader_that_lost_its_share_gets_it_while_another_one_trains() -> None:
    """Its connection broke, or the controller was killed between the shares."""
    core = make_core(data_parallel_size=2)
    for lease in join_workers(core)[:2]:
        finish_lease(core, lease, 0)
    for leader in range(2):
        core.handle(inputs.TrainerJoined(leader), 0)
        actions = core.handle(inputs.BatchRequested(leader, 0), 0)
    [batch] = actions
    assert isinstance(batch, SendBatch) and batch.leaders == {0, 1}
    again = restart_core(core, core.state.take_events())
    again.handle(inputs.TrainerJoined(1), 0)
    for each in (core, again):
        [same] = each.handle(inputs.BatchRequested(1, 0), 0)
        assert isinstance(same, SendBatch) and (same.version, same.leaders) == (0, {1})
        assert [g.group_id for g in same.groups] == [g.group_id for g in batch.groups]


def test_report_that_was_lost_may_come_after_the_requests_for_the_next_batch() -> None:
    core = make_core(data_parallel_size=2, max_staleness=3)
    for lease in join_workers(core)[:4]:
        finish_lease(core, lease, 0)
    for version in (0, 1):
        for leader in range(2):
            actions = core.handle(inputs.BatchRequested(leader, version), 0)
    assert actions == [] and not core.batch_awaited
    actions = core.handle(inputs.Received("trainer-0", StepDone(1, {})), 0)
    assert [a.version for a in actions if isinstance(a, SendBatch)] == [1]


class RecoveringMachine(CoreMachine):
    """Adds a journal and crashes to the state machine of test_core.py.

    A crash keeps the events that had reached the disk. A batch is sent only when its events are on
    disk. The trainer crashes too.
    """

    @initialize(
        max_staleness=st.integers(0, 3),
        wait=st.booleans(),
        equal=st.booleans(),
        kv_lease_limit=st.sampled_from([None, 0.5, 1.0]),
        seed=st.integers(0, 1 << 20),
    )
    def begin(
        self, max_staleness: int, wait: bool, equal: bool, kv_lease_limit: float | None, seed: int
    ) -> None:
        self.disk: list[JournalEvent] = []
        self.unwritten: list[JournalEvent] = []
        self.steps_done = 0  # by the trainer
        super().begin(max_staleness, wait, equal, kv_lease_limit, leaders=1, seed=seed)

    def take(self, actions: list[Action]) -> None:
        self.unwritten += self.core.state.take_events()
        if any(isinstance(action, SendBatch) for action in actions):
            self.flush()
        super().take([action for action in actions if not isinstance(action, ResendBatch)])

    def check_batch(self, batch: SendBatch) -> None:
        known = next(
            (f for f in self.disk if isinstance(f, BatchSelected) and f.version == batch.version),
            None,
        )
        assert known is not None and known.group_ids == [group.group_id for group in batch.groups]
        if set(known.group_ids) <= set(self.trained):  # sent again after a crash
            self.batch = batch
        else:
            super().check_batch(batch)

    @rule()
    def flush(self) -> None:
        self.disk += self.unwritten
        self.unwritten = []

    @rule(written_share=st.floats(0, 1))
    def crash_the_controller(self, written_share: float) -> None:
        before = self.core
        self.disk += self.unwritten[: round(written_share * len(self.unwritten))]
        self.unwritten = []
        self.core = restart_core(before, self.disk)
        self.take(self.core.handle(inputs.RewardJoined("reward-0", 8), self.now))
        self.join_rollout()
        # the trainer repeats its last report
        self.take(
            self.core.handle(inputs.Received("trainer-0", StepDone(self.steps_done, {})), self.now)
        )
        assert self.core.version == self.steps_done
        if self.batch is not None:
            [again] = self.core.handle(inputs.BatchRequested(0, self.steps_done), self.now)
            assert [g.group_id for g in again.groups] == [g.group_id for g in self.batch.groups]

    @precondition(lambda self: self.core.version > 0)
    @rule(share=st.floats(0, 1))
    def crash_the_trainer(self, share: float) -> None:
        state = self.core.state.ledger.table(self.core.state.pending)
        self.core.handle(inputs.TrainerJoined(0), 0)
        for version in range(int(share * self.core.version), self.core.version):
            assert self.core.handle(inputs.BatchRequested(0, version), self.now) == [
                ResendBatch(version, frozenset({0}))
            ]
            assert any(isinstance(f, BatchSelected) and f.version == version for f in self.disk)
            step = inputs.Received("trainer-0", StepDone(version + 1, {}))
            assert self.core.handle(step, self.now) == [ReportStep(version + 1, None)]
        assert self.core.state.ledger.table(self.core.state.pending) == state

    @precondition(lambda self: self.batch is not None)
    @rule()
    def finish_the_step(self) -> None:
        self.steps_done += 1
        super().finish_the_step(early=False)
        self.flush()  # before any server holds the new weights

    @precondition(lambda self: self.leases)
    @rule()
    def interrupt(self) -> None:
        worker, lease = self.random.choice(self.leases)
        index, first = self.random.choice(lease.indices), max(0, self.core.version - 1)
        message = PartialSample(
            lease.key(index),
            make_partial(first, self.core.version),
        )
        self.take(self.core.handle(inputs.Received(worker, message), 0))

    @invariant()
    def every_admitted_group_is_in_one_place(self) -> None:
        if not hasattr(self, "core"):
            return
        events = self.disk + self.unwritten
        admitted = [f.group_id for f in events if isinstance(f, GroupAdmitted)]
        done = {f.version for f in events if isinstance(f, BatchTrained)}
        trained = [
            g
            for f in events
            if isinstance(f, BatchSelected) and f.version + 1 in done
            for g in f.group_ids
        ]
        closed = [f.group_id for f in events if isinstance(f, GroupDropped)]
        pending = [g.group_id for g in self.core.state.groups.values() if g.purpose == "train"]
        assert sorted(admitted) == sorted(trained + closed + pending)


TestRecoveringMachine = RecoveringMachine.TestCase
TestRecoveringMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
