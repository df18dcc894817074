"""Visits every state that the core can reach in a small setting, over all interleavings and faults.

The search is breadth first. The setting: one group a step, one sample a group, one server, one
reward worker, a trainer, and a budget of faults: a message lost or duplicated, the server, the
trainer or the controller (with or without its last unwritten events) killed, a failed scoring
attempt, an expired lease. Two states are equal if core, network, trainer and unwritten events are.

Two reductions leave out what adds no input of the core. A lease and its sample are one message,
"sample", which may arrive at any time; when the server is killed, every part of the samples under
way may have been sent before. And a state that was visited with more faults left is not visited
again with fewer: all that can follow from it has been.

With one fault there are about 1,900 states, with two about 44,000.
"""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from core_builders import core_settings, make_sample

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import Action, ResendBatch, Send, SendBatch
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.groups import Group, GroupState
from megatron_async_rl.controller.journal.events import (
    BatchSelected,
    JournalEvent,
)
from megatron_async_rl.protocol.messages import (
    Generate,
    Generated,
    ScoreRequest,
    ScoreResult,
    StepDone,
)
from megatron_async_rl.protocol.types import Prompt, SampleKey

RULES = core_settings(
    prompts_per_step=1,
    samples_per_prompt=1,
    max_staleness=1,
    wait_for_stragglers=False,
    max_attempts=3,
    max_scoring_attempts=2,
    steps=2,
)
SERVER, REWARD_WORKER = "rollout-0", "reward-0"
PROMPT = np.arange(3, dtype=np.int32)
Copied = TypeVar("Copied")


class Prompts:
    """A prompt stream with a position that can be copied with its core."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def __call__(self) -> Prompt:
        self.position += 1
        return Prompt(str(self.position - 1), PROMPT, {})


def shallow_copy(instance: Copied) -> Copied:
    """Copies a plain object as copy.copy() does, in a fraction of its time."""
    twin = object.__new__(type(instance))
    twin.__dict__.update(instance.__dict__)
    return twin


def cloned(core: Core) -> Core:
    """Returns a copy that shares no mutable state."""
    was = core.state
    new = Core(RULES, Prompts(was._next_prompt.position), core.epoch)
    new.admitting, new.batches_held = core.admitting, core.batches_held
    new.resent_version = core.resent_version
    new.num_fenced_messages, new.num_replayed_steps = (
        core.num_fenced_messages,
        core.num_replayed_steps,
    )
    new.fleet.rollout.update(
        (name, shallow_copy(worker)) for name, worker in core.fleet.rollout.items()
    )
    new.fleet.reward.update(
        (name, shallow_copy(worker)) for name, worker in core.fleet.reward.items()
    )
    state, ledger = new.state, new.state.ledger
    state.version, state._next_group_id, state.recorded = (
        was.version,
        was._next_group_id,
        list(was.recorded),
    )
    ledger.admitted, ledger.trained = was.ledger.admitted, was.ledger.trained
    ledger.dropped = Counter(was.ledger.dropped)
    for key, group in was.groups.items():
        state.groups[key] = state._by_state[group.state][key] = twin = shallow_copy(group)
        twin.samples, twin.rewards, twin.failed_on = (
            list(group.samples),
            list(group.rewards),
            list(group.failed_on),
        )
        twin.partials, twin.turn_rewards = dict(group.partials), dict(group.turn_rewards)
    state.in_batch = [state.groups[group.group_id] for group in was.in_batch]
    new.scoring.waiting = deque(shallow_copy(task) for task in core.scoring.waiting)
    new.scoring.assigned = {key: shallow_copy(task) for key, task in core.scoring.assigned.items()}
    selector = core.batch_selector
    new.batch_selector.requests = dict(selector.requests)
    new.batch_selector.requested_since = selector.requested_since
    return new


def forget(core: Core) -> None:
    """Frees a core without a garbage collection: breaks its cycles."""
    for part in (core, core.fleet.rollout, core.fleet.reward):
        part.__dict__.clear()


@dataclass
class State:
    core: Core
    wire: tuple = ()  # ("sample" | "score", message fields); any may arrive next
    steps_done: int = 0  # of the trainer's weights
    batch: tuple[int, ...] = ()  # the groups that the trainer trains now
    weights: tuple[int, ...] = ()  # the groups that its weights contain
    faults: int = 0  # that may still happen
    disk: tuple[JournalEvent, ...] = ()
    unwritten: tuple[JournalEvent, ...] = ()
    last: tuple = field(default=(), compare=False)  # (what `last` was before, event)

    @property
    def trace(self) -> list[object]:
        """The events that led here."""
        events, before = [], self.last
        while before:
            before, event = before
            events.append(event)
        return events[::-1]

    def key(self) -> tuple:
        core = self.core
        groups = tuple(
            (
                g.group_id, g.state, g.attempt, g.worker, g.floor_version, tuple(g.rewards),
                len(g.failed_on),
                tuple(s is not None and s.oldest_version for s in g.samples),
            )
            for g in core.state.groups.values()
        )  # fmt: skip
        fleet = tuple((w.state, w.version, w.load) for w in core.fleet.rollout.values())
        scoring = tuple(
            (t.request.key, t.worker, t.num_failed, t.deadline)
            for t in [*core.scoring.assigned.values(), *core.scoring.waiting]
        )
        dropped = frozenset(core.state.ledger.dropped.items())
        way = tuple((type(f).__name__, getattr(f, "group_id", -1)) for f in self.unwritten)
        return (
            core.version, core.state.ledger.admitted, core.state.ledger.trained, dropped,
            groups, fleet, core.epoch,
            scoring, core.batch_selector.requested_since, tuple(sorted(self.wire)),
            self.steps_done, self.batch, self.weights, way,
        )  # fmt: skip


def after(state: State, event: object, **changes: object) -> State:
    """Returns a copy of the state that the next event may change."""
    return replace(state, core=cloned(state.core), last=(state.last, event), **changes)


def take(state: State, actions: list[Action]) -> State:
    """Does the actions: events to the journal, messages to the network, a batch to the trainer."""
    state.unwritten += tuple(state.core.state.take_events())
    for action in actions:
        if isinstance(action, SendBatch):
            flush(state)
            check_batch(state, action)
            state.batch = tuple(group.group_id for group in action.groups)
        elif isinstance(action, Send) and isinstance(action.message, Generate):
            m = action.message
            state.wire += (
                (
                    "sample",
                    m.epoch,
                    m.group_id,
                    m.attempt,
                    state.core.fleet.rollout[SERVER].version,
                ),
            )
        elif isinstance(action, Send) and isinstance(action.message, ScoreRequest):
            key = action.message.key
            state.wire += (("score", key.epoch, key.group_id, key.attempt, 0),)
    return state


def flush(state: State) -> None:
    state.disk += state.unwritten
    state.unwritten = ()


def check_batch(state: State, batch: SendBatch) -> None:
    known = [f for f in state.disk if isinstance(f, BatchSelected) and f.version == batch.version]
    assert len(known) == 1 and known[0].group_ids == [group.group_id for group in batch.groups], (
        state.trace
    )
    for group in batch.groups:
        assert group.group_id not in state.weights, ("trained twice", state.trace)
        assert batch.version - group.samples[0].oldest_version <= RULES.max_staleness, (
            "stale",
            state.trace,
        )


def successors(state: State) -> Iterator[State]:
    for number, message in enumerate(state.wire):
        rest = state.wire[:number] + state.wire[number + 1 :]
        yield deliver(after(state, message, wire=rest), message)
        if state.faults:
            yield after(state, ("lost", message), wire=rest, faults=state.faults - 1)
            yield deliver(after(state, ("duplicated", message), faults=state.faults - 1), message)
            if message[0] == "score":
                yield deliver(
                    after(state, "scoring failed", wire=rest, faults=state.faults - 1),
                    message,
                    reward=None,
                )
    if not state.batch and state.steps_done < RULES.steps and not state.core.batch_awaited:
        new = after(state, "batch wanted")
        yield take(new, new.core.handle(inputs.BatchRequested(0, new.steps_done), 0.0))
    if state.batch:
        yield end_step(after(state, "step done"))
    for group in state.core.state.groups.values():
        # If its message is lost, a lease must expire; if it is only slow, expiry is a fault.
        lost = not any(m[2:4] == (group.group_id, group.attempt) for m in state.wire)
        if group.state is GroupState.RUNNING and (lost or state.faults):
            yield expire(
                after(state, f"{group.group_id} is late", faults=state.faults - (not lost)), group
            )
    if state.faults:
        for wire in without_some_samples(state.wire):
            yield crash_server(after(state, "server killed", wire=wire, faults=state.faults - 1))
        yield crash_trainer(after(state, "trainer killed", faults=state.faults - 1))
        for arrived in {0, len(state.unwritten)}:
            yield crash_controller(
                after(
                    state, f"controller killed, {arrived} events written", faults=state.faults - 1
                ),
                arrived,
            )


def deliver(state: State, message: tuple, reward: float | None = 1.0) -> State:
    kind, epoch, group_id, attempt, version = message
    core, key = state.core, SampleKey(epoch, group_id, attempt, 0)
    if kind == "sample":
        return take(
            state,
            core.handle(inputs.Received(SERVER, Generated(key, make_sample(version))), 0.0),
        )
    return take(state, core.handle(inputs.Received(REWARD_WORKER, ScoreResult(key, reward)), 0.0))


def expire(state: State, group: Group) -> State:
    state.core.state.running.set_deadline(group.group_id, -1.0)
    for task in state.core.scoring.assigned.values():
        task.deadline = -1.0
    return take(state, state.core.handle(inputs.Tick(), 0.0))


def end_step(state: State) -> State:
    state.weights, state.batch = state.weights + state.batch, ()
    state.steps_done += 1
    take(
        state, state.core.handle(inputs.Received("trainer-0", StepDone(state.steps_done, {})), 0.0)
    )
    flush(state)
    assert state.core.version == state.steps_done, state.trace
    state.core.handle(inputs.UpdateStarted(SERVER), 0)
    return take(
        state, state.core.handle(inputs.ServerUpdated(SERVER, version=state.core.version), 0.0)
    )


def without_some_samples(wire: tuple) -> set[tuple]:
    """Returns the possible rest of the wire: the killed server had sent any of its samples."""
    kept: set[tuple] = {()}
    for message in wire:
        kept = {(*left, message) for left in kept} | (kept if message[0] == "sample" else set())
    return kept


def crash_server(state: State) -> State:
    take(state, state.core.handle(inputs.RolloutJoined(SERVER, 4), 0.0))
    return take(
        state, state.core.handle(inputs.ServerUpdated(SERVER, version=state.core.version), 0.0)
    )


def crash_trainer(state: State) -> State:
    """Restarts from nothing: every batch must be resent and end in the same weights."""
    state.core.handle(inputs.TrainerJoined(0), 0)
    recorded = [
        g
        for f in state.disk
        if isinstance(f, BatchSelected) and f.version < state.core.version
        for g in f.group_ids
    ]
    for version in range(state.core.version):
        assert state.core.handle(inputs.BatchRequested(0, version), 0.0) == [
            ResendBatch(version, frozenset({0}))
        ], state.trace
    state.weights, state.batch, state.steps_done = tuple(recorded), (), state.core.version
    return state


def crash_controller(state: State, arrived: int) -> State:
    state.disk, state.unwritten = state.disk + state.unwritten[:arrived], ()
    core = state.core = Core(RULES, Prompts(), epoch=0)
    core.restore(state.disk)
    core.admitting = True
    take(state, core.handle(inputs.RewardJoined(REWARD_WORKER, 4), 0.0))
    take(state, core.handle(inputs.RolloutJoined(SERVER, 4), 0.0))
    take(state, core.handle(inputs.ServerUpdated(SERVER, version=core.version), 0.0))
    assert core.version == state.steps_done, state.trace
    if state.batch:
        again = core.handle(inputs.BatchRequested(0, state.steps_done), 0.0)
        assert [tuple(g.group_id for g in a.groups) for a in again if isinstance(a, SendBatch)] == [
            state.batch
        ], state.trace
    return state


def search(num_faults: int, limit: int = 3_000_000) -> tuple[int, int]:
    """Visits the whole space of so many faults; returns the numbers of states and transitions.

    Raises AssertionError with a trace to a violation: one of the fewest faults, the shortest of
    those.
    """
    gc.disable()  # forget() frees the cores; collections would take a third of the time
    try:
        return _search(num_faults, limit)
    finally:
        gc.enable()


def _search(num_faults: int, limit: int) -> tuple[int, int]:
    core = Core(RULES, Prompts(), epoch=0)
    core.restore([])
    core.admitting = True
    first = take(
        State(core, faults=num_faults), core.handle(inputs.RewardJoined(REWARD_WORKER, 4), 0.0)
    )
    take(first, core.handle(inputs.RolloutJoined(SERVER, 4), 0.0))
    take(first, core.handle(inputs.ServerUpdated(SERVER, version=0), 0.0))
    seen, transitions, ended = {hash(first.key())}, 0, 0
    waiting = [deque[State]() for _ in range(num_faults)] + [deque([first])]
    while any(waiting):
        state = next(states for states in reversed(waiting) if states).popleft()
        own_key = hash(state.key())
        ended += len(state.weights) == RULES.steps
        moved = False
        for new in successors(state):
            transitions += 1
            new.core.state.check()
            assert len(set(new.weights)) == len(new.weights), new.trace
            key = hash(new.key())
            moved = moved or (key != own_key and new.faults == state.faults)
            if key in seen:
                forget(new.core)
            else:
                seen.add(key)
                waiting[new.faults].append(new)
        assert moved or len(state.weights) == RULES.steps, ("stuck", state.trace)
        assert len(seen) < limit
        forget(state.core)
    assert ended
    return len(seen), transitions
