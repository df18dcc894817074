"""Every state that the real core can reach in a small setting, breadth first over all interleavings and faults.

One group a step, one sample a group, one server, one judge, a trainer; a budget of faults among: a message lost, a message
doubled, the server, the controller (with or without its last, unflushed facts) or the trainer killed, a judge without
verdict, a lease that runs out. Two states are one when core, wire, trainer and unwritten facts are equal.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from core_builders import core_settings, make_sample

from megatron_async_rl.controller.core.actions import Action, ResendBatch, Send, SendBatch
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.events import (
    AnyEvent,
    BatchSelected,
    JournalEvent,
    SampleReturned,
)
from megatron_async_rl.controller.core.groups import Group, GroupState
from megatron_async_rl.controller.core.ledger import DropReason
from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.errors import LedgerError
from megatron_async_rl.protocol.messages import Generate, Generated, ScoreRequest, ScoreResult
from megatron_async_rl.protocol.types import Prompt, SampleKey

RULES = core_settings(
    prompts_per_step=1,
    samples_per_prompt=1,
    max_staleness=1,
    wait_for_stragglers=False,
    max_attempts=3,
    max_verdict_attempts=2,
    steps=2,
)
FAULTS = 2
SERVER, JUDGE = "rollout-0", "reward-0"
PROMPT = np.arange(3, dtype=np.int32)


class Prompts:
    """A stream that can be copied with the core that reads it."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def __call__(self) -> Prompt:
        self.position += 1
        return Prompt(str(self.position - 1), PROMPT, {})


def cloned(core: Core) -> Core:
    """A copy that shares nothing that changes."""
    was = core.state
    new = Core(RULES, Prompts(was._next_prompt.position), core.epoch)
    new.admitting, new.hold_batches = core.admitting, core.hold_batches
    new.num_fenced_messages, new.num_replayed_steps = (
        core.num_fenced_messages,
        core.num_replayed_steps,
    )
    new.fleet.rollout.update(
        (name, copy.copy(worker)) for name, worker in core.fleet.rollout.items()
    )
    new.fleet.reward.update((name, copy.copy(worker)) for name, worker in core.fleet.reward.items())
    state, ledger = new.state, new.ledger
    state.version, state._next_group_id, state.facts = (
        was.version,
        was._next_group_id,
        list(was.facts),
    )
    ledger.admitted, ledger.trained = was.ledger.admitted, was.ledger.trained
    ledger.dropped = Counter(was.ledger.dropped)
    for key, group in was.groups.items():
        state.groups[key] = state._by_state[group.state][key] = twin = copy.copy(group)
        twin.samples, twin.rewards, twin.failed_on = (
            list(group.samples),
            list(group.rewards),
            list(group.failed_on),
        )
        twin.partials, twin.verdict_attempts = dict(group.partials), dict(group.verdict_attempts)
    state.in_batch = [state.groups[group.group_id] for group in was.in_batch]
    new.verdicts.owed, new.verdicts.under_way = (
        deque(core.verdicts.owed),
        dict(core.verdicts.under_way),
    )
    new.cut.leaders_want, new.cut.wanted_since = dict(core.cut.leaders_want), core.cut.wanted_since
    return new


@dataclass
class State:
    core: Core
    wire: tuple = ()  # ("lease" | "sample" | "score", message fields), any of which may come next
    steps_done: int = 0  # of the trainer's weights
    batch: tuple[int, ...] = ()  # the groups that the trainer is at
    weights: tuple[int, ...] = ()  # the groups that its weights are made of
    faults: int = FAULTS
    disk: tuple[JournalEvent, ...] = ()
    on_the_way: tuple[JournalEvent, ...] = ()
    trace: tuple[str, ...] = field(default=(), compare=False)

    def key(self) -> tuple:
        core = self.core
        groups = tuple(
            (
                g.group_id, g.state, g.attempt, g.worker, g.floor_version, tuple(g.rewards), len(g.failed_on),
                tuple(s is not None and s.oldest_version for s in g.samples), tuple(g.verdict_attempts.items()),
            )
            for g in core.groups.values()
        )  # fmt: skip
        fleet = tuple((w.state, w.version, w.load) for w in core.fleet.rollout.values())
        dropped = tuple(core.ledger.dropped[reason] for reason in DropReason)
        way = tuple((type(f).__name__, getattr(f, "group_id", -1)) for f in self.on_the_way)
        return (
            core.version, core.ledger.admitted, core.ledger.trained, dropped, groups, fleet, core.epoch,
            tuple(core.verdicts.under_way.items()), tuple(core.verdicts.owed), core.cut.wanted_since, tuple(sorted(self.wire)),
            self.steps_done, self.batch, self.weights, self.faults, way,
        )  # fmt: skip


def after(state: State, event: str, **changes: object) -> State:
    """A copy to which an event can be done."""
    return replace(state, core=cloned(state.core), trace=(*state.trace, event), **changes)


def take(state: State, actions: list[Action]) -> State:
    """The shell: facts to the journal, messages to the wire, a batch to the trainer."""
    state.on_the_way += tuple(state.core.take_events())
    for action in actions:
        if isinstance(action, SendBatch):
            flush(state)
            check_batch(state, action)
            state.batch = tuple(group.group_id for group in action.groups)
        elif isinstance(action, Send) and isinstance(action.message, Generate):
            m = action.message
            state.wire += (
                ("lease", m.epoch, m.group_id, m.attempt, state.core.fleet.rollout[SERVER].version),
            )
        elif isinstance(action, Send) and isinstance(action.message, ScoreRequest):
            key = action.message.key
            state.wire += (("score", key.epoch, key.group_id, key.attempt, 0),)
    return state


def flush(state: State) -> None:
    state.disk += state.on_the_way
    state.on_the_way = ()


def check_batch(state: State, cut: SendBatch) -> None:
    known = [f for f in state.disk if isinstance(f, BatchSelected) and f.version == cut.version]
    assert len(known) == 1 and known[0].group_ids == [group.group_id for group in cut.groups], (
        state.trace
    )
    for group in cut.groups:
        assert group.group_id not in state.weights, ("trained twice", state.trace)
        assert cut.version - group.samples[0].oldest_version <= RULES.max_staleness, (
            "stale",
            state.trace,
        )


def successors(state: State) -> Iterator[State]:
    for number, message in enumerate(state.wire):
        rest = state.wire[:number] + state.wire[number + 1 :]
        yield deliver(after(state, f"{message}", wire=rest), message)
        if state.faults:
            yield after(state, f"lost {message}", wire=rest, faults=state.faults - 1)
            yield deliver(after(state, f"doubled {message}", faults=state.faults - 1), message)
            if message[0] == "score":
                yield deliver(
                    after(state, "no verdict", wire=rest, faults=state.faults - 1),
                    message,
                    reward=None,
                )
    if not state.batch and state.steps_done < RULES.steps and not state.core.batch_awaited:
        new = after(state, "batch wanted")
        yield take(new, new.core.batch_wanted(0, new.steps_done, 0.0))
    if state.batch:
        yield end_step(after(state, "step done"))
    for group in state.core.groups.values():
        # with its message lost a lease is bound to run out; with the message merely slow, that is a fault
        lost = not any(m[2:4] == (group.group_id, group.attempt) for m in state.wire)
        if group.state is GroupState.RUNNING and (lost or state.faults):
            yield expire(
                after(state, f"{group.group_id} is late", faults=state.faults - (not lost)), group
            )
    if state.faults:
        yield crash_server(after(state, "server killed", faults=state.faults - 1))
        yield crash_trainer(after(state, "trainer killed", faults=state.faults - 1))
        for arrived in {0, len(state.on_the_way)}:
            yield crash_controller(
                after(
                    state, f"controller killed, {arrived} facts arrived", faults=state.faults - 1
                ),
                arrived,
            )


def deliver(state: State, message: tuple, reward: float | None = 1.0) -> State:
    kind, epoch, group_id, attempt, version = message
    core, key = state.core, SampleKey(epoch, group_id, attempt, 0)
    if kind == "lease":
        state.wire += (("sample", epoch, group_id, attempt, version),)
        return state
    if kind == "sample":
        return take(
            state,
            core.generated(SERVER, Generated(key, make_sample(version)), 0.0),
        )
    return take(state, core.scored(JUDGE, ScoreResult(key, reward), 0.0))


def expire(state: State, group: Group) -> State:
    state.core.groups[group.group_id].deadline = -1.0
    verdicts = state.core.verdicts
    verdicts.under_way = {
        key: replace(verdict, deadline=-1.0) for key, verdict in verdicts.under_way.items()
    }
    return take(state, state.core.tick(0.0))


def end_step(state: State) -> State:
    state.weights, state.batch = state.weights + state.batch, ()
    state.steps_done += 1
    take(state, state.core.step_done(state.steps_done, 0.0))
    flush(state)
    assert state.core.version == state.steps_done, state.trace
    state.core.updating(SERVER)
    return take(state, state.core.serving(SERVER, state.core.version, 0.0))


def crash_server(state: State) -> State:
    state.wire = tuple(message for message in state.wire if message[0] != "lease")
    take(state, state.core.rollout_joined(SERVER, 4, 0.0))
    return take(state, state.core.serving(SERVER, state.core.version, 0.0))


def crash_trainer(state: State) -> State:
    """Back to nothing: every batch must be there again, and end in the same weights."""
    state.core.trainer_joined(0)
    recorded = [
        g
        for f in state.disk
        if isinstance(f, BatchSelected) and f.version < state.core.version
        for g in f.group_ids
    ]
    for version in range(state.core.version):
        assert state.core.batch_wanted(0, version, 0.0) == [ResendBatch(version)], state.trace
    state.weights, state.batch, state.steps_done = tuple(recorded), (), state.core.version
    return state


def crash_controller(state: State, arrived: int) -> State:
    state.disk, state.on_the_way = state.disk + state.on_the_way[:arrived], ()
    core = state.core = Core(RULES, Prompts(), epoch=0)
    core.restore(state.disk)
    core.admitting = True
    take(state, core.reward_joined(JUDGE, 4, 0.0))
    take(state, core.rollout_joined(SERVER, 4, 0.0))
    take(state, core.serving(SERVER, core.version, 0.0))
    assert core.version == state.steps_done, state.trace
    if state.batch:
        again = core.batch_wanted(0, state.steps_done, 0.0)
        assert [tuple(g.group_id for g in a.groups) for a in again if isinstance(a, SendBatch)] == [
            state.batch
        ], state.trace
    return state


def search(limit: int = 3_000_000) -> tuple[int, int]:
    """(states, transitions) of the whole space. Raises AssertionError with the shortest trace to a breach."""
    core = Core(RULES, Prompts(), epoch=0)
    core.restore([])
    core.admitting = True
    first = take(State(core), core.reward_joined(JUDGE, 4, 0.0))
    take(first, core.rollout_joined(SERVER, 4, 0.0))
    take(first, core.serving(SERVER, 0, 0.0))
    seen, waiting, transitions, ended = {hash(first.key())}, deque([first]), 0, 0
    while waiting:
        state = waiting.popleft()
        ended += len(state.weights) == RULES.steps
        moved = False
        for new in successors(state):
            transitions += 1
            new.core.check()
            assert len(set(new.weights)) == len(new.weights), new.trace
            key = hash(new.key())
            moved = moved or key != hash(state.key())
            if key not in seen:
                seen.add(key)
                waiting.append(new)
        assert moved or len(state.weights) == RULES.steps, ("stuck", state.trace)
        assert len(seen) < limit
    assert ended
    return len(seen), transitions


@pytest.mark.slow
def test_every_reachable_state_keeps_the_guarantees() -> None:
    states, transitions = search()
    print(f"{states:,} states, {transitions:,} transitions, exhausted")
    assert states >= 100_000


def test_search_finds_a_seeded_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = ControllerState._apply

    def forgetful(self: ControllerState, fact: AnyEvent) -> None:
        apply(self, fact)
        if isinstance(fact, SampleReturned):
            self.forget(self.groups[fact.group_id])

    monkeypatch.setattr(ControllerState, "_apply", forgetful)
    with pytest.raises(LedgerError, match="a group was lost"):
        search()
