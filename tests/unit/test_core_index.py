"""The core's indexes decide like a scan of all groups and servers would."""

from __future__ import annotations

import itertools

from core_builders import LEASE_S, evaluation_tasks, generated, make_core, messages_of
from core_machine import CoreMachine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.fleet import MIXED_SHARE, Fleet, ServerState
from megatron_async_rl.controller.core.groups import GroupState
from megatron_async_rl.controller.core.index import LazyHeap
from megatron_async_rl.protocol.messages import Generate


class IndexMachine(CoreMachine):
    """The core under random events; after each, every index is compared with a scan."""

    @invariant()
    def index_equals_scan(self) -> None:
        if not hasattr(self, "core"):
            return
        state, fleet, newest = self.core.state, self.core.fleet, self.core.version + 1
        for worker in fleet.rollout:
            running = [g for g in state.in_state(GroupState.RUNNING) if g.worker == worker]
            assert state.running.of(worker) == running
        for groups in (state.queued, state.running, state.ready):
            ages = [group.oldest_version for group in groups.values()]
            for version in range(newest + 1):
                assert groups.has_older_than(version) == any(age < version for age in ages)
        for room in range(4):
            fitting = [g for g in state.in_state(GroupState.QUEUED) if len(g.missing) <= room]
            assert state.queued.next(room, "train") == (fitting[0] if fitting else None)
            for version in range(newest + 1):
                free = [
                    (w.load, w.name)
                    for w in fleet.rollout.values()
                    if w.is_serving
                    and w.version >= version
                    and w.load + room <= w.capacity
                    and not w.is_full
                ]
                server = fleet.rollout.least_loaded(room, version)
                assert (server and server.name) == (min(free)[1] if free else None)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 5))))
def test_lazy_heap_returns_the_least_key_after_any_changes(changes: list[tuple[int, int]]) -> None:
    heap, keys = LazyHeap(), {}
    for id_, key in changes:
        if key < 0:
            heap.discard(id_)
            keys.pop(id_, None)
        else:
            heap.put(id_, key)
            keys[id_] = key
        assert heap.first() == min(((key, id_) for id_, key in keys.items()), default=None)


def test_lazy_heap_does_not_grow_with_changes() -> None:
    heap = LazyHeap()
    for number in range(10_000):
        heap.put(number % 4, number)
    assert len(heap._entries) < 200


CHANGES = st.one_of(
    st.tuples(st.sampled_from(["load", "eval_load"]), st.integers(0, 9)),
    st.tuples(st.just("version"), st.integers(0, 2)),
    st.tuples(st.just("state"), st.sampled_from([ServerState.SERVING, ServerState.UPDATING])),
    st.tuples(st.just("is_held"), st.booleans()),
)


@given(st.lists(st.tuples(st.integers(0, 3), CHANGES)))
def test_evaluation_finds_servers_as_a_scan_would(changes: list[tuple]) -> None:
    fleet = Fleet()
    workers = [
        fleet.join_rollout(f"rollout-{n}", capacity, 0.0) for n, capacity in enumerate([1, 4, 8, 8])
    ]
    for number, (attribute, value) in changes:
        setattr(workers[number], attribute, value)
        free = [w for w in workers if w.is_serving and w.total_load < w.capacity]
        shares = [w for w in free if w.eval_load < max(1, w.capacity // MIXED_SHARE)]
        found = fleet.rollout.free_for_evaluation(lambda line: line.has_share)
        assert found is min(shares, key=lambda w: (w.total_load, w.name), default=None)
        for wanted in itertools.product(range(3), (False, True)):
            exact = [w for w in free if (w.version, w.is_held) == wanted]
            found = fleet.rollout.free_for_evaluation(
                lambda line, wanted=wanted: (line.version, line.is_held) == wanted
            )
            assert found is min(exact, key=lambda w: (w.total_load, w.name), default=None)


def test_lost_worker_object_does_not_return_to_the_pool() -> None:
    fleet = Fleet()
    lost = fleet.join_rollout("rollout-0", 8, 0.0)
    del fleet.rollout["rollout-0"]
    lost.state, lost.version = ServerState.SERVING, 3
    assert fleet.rollout.least_loaded(1, 0) is None and fleet.rollout.max_room(0) == -1


def test_group_that_does_not_fit_does_not_block_later_ones() -> None:
    core = make_core(samples_per_prompt=4, max_staleness=8)
    core.handle(inputs.RolloutJoined("rollout-0", 8), 0)
    _, second = messages_of(core.handle(inputs.ServerUpdated("rollout-0", version=0), 0), Generate)
    for index in (0, 1, 2):
        core.handle(inputs.Received("rollout-0", generated(second, index, 0)), 0)
    core.handle(inputs.WorkerLost("rollout-0"), 0)
    core.handle(inputs.RolloutJoined("rollout-1", 3), 0)
    leased = messages_of(core.handle(inputs.ServerUpdated("rollout-1", version=0), 0), Generate)
    assert [lease.group_id for lease in leased] == [second.group_id]  # misses one, the first four


def test_evaluation_groups_are_leased_before_requeued_training_groups() -> None:
    core = make_core()
    core.handle(inputs.RolloutJoined("rollout-0", 2), 0)
    core.handle(inputs.ServerUpdated("rollout-0", version=0), 0)
    core.handle(inputs.EvaluationRequested(0, "pause", evaluation_tasks(2)), 0)
    core.handle(inputs.WorkerLost("rollout-0"), 0)
    core.handle(inputs.RolloutJoined("rollout-1", 8), 0)
    leased = messages_of(core.handle(inputs.ServerUpdated("rollout-1", version=0), 0), Generate)
    assert [lease.purpose for lease in leased] == ["eval", "eval"]


def test_leases_that_miss_samples_expire_in_admission_order_and_once() -> None:
    core, leases = make_core(max_staleness=8), []
    for number in range(4):
        name, now = f"rollout-{number}", float(number)
        core.handle(inputs.RolloutJoined(name, 2), now)
        leases += messages_of(core.handle(inputs.ServerUpdated(name, version=0), now), Generate)
    core.handle(inputs.Received("rollout-0", generated(leases[0], 0, 0)), 4)
    for index in (0, 1):  # returned, but not scored: still running
        core.handle(inputs.Received("rollout-1", generated(leases[1], index, 0)), 4)
    core.handle(inputs.WorkerLost("rollout-2"), 4)
    core.handle(inputs.RolloutJoined("rollout-2", 2), 5)
    again = messages_of(core.handle(inputs.ServerUpdated("rollout-2", version=0), 5), Generate)
    running = core.state.running
    assert [lease.group_id for lease in again][:1] == [leases[2].group_id]
    assert running.take_expired(LEASE_S) == []
    expired = [group.group_id for group in running.take_expired(LEASE_S + 4)]
    assert expired == [leases[0].group_id, leases[3].group_id]  # the third one was leased again
    assert running.take_expired(LEASE_S + 4) == []
    assert leases[2].group_id in [g.group_id for g in running.take_expired(LEASE_S + 6)]
