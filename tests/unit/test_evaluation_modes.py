"""Modes of an evaluation in the core: its servers, exact versions, no effect on training."""

from __future__ import annotations

from typing import Literal

import pytest
from core_builders import (
    evaluation_tasks,
    generated,
    make_core,
    messages_of,
    scored,
)

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import (
    Action,
    FinishEvaluation,
    ReportError,
    ReportEvaluated,
    Send,
)
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.protocol.messages import Generate, GenerateFailed, ScoreRequest, StepDone

Leases = list[tuple[str, Generate]]


def leases_of(actions: list[Action], purpose: Literal["train", "eval"]) -> Leases:
    """Returns (server, lease) of the leases of that purpose."""
    return [
        (action.worker, action.message)
        for action in actions
        if isinstance(action, Send)
        and isinstance(action.message, Generate)
        and action.message.purpose == purpose
    ]


def core_with_servers(count: int, capacity: int = 4, **changes: object) -> Core:
    core = make_core(**changes)
    core.admitting = False
    core.handle(inputs.RewardJoined("reward-0", 100), 0)
    for number in range(count):
        core.handle(inputs.RolloutJoined(f"rollout-{number}", capacity), 0)
        core.handle(inputs.ServerUpdated(f"rollout-{number}", version=0), 0)
    return core


def request(core: Core, mode: Literal["pause", "held_server", "mixed"], count: int) -> list[Action]:
    event = inputs.EvaluationRequested(core.version, mode, evaluation_tasks(count))
    return core.handle(event, 0)


def finish(core: Core, lease: Generate, version: int, server: str, now: float = 0) -> list[Action]:
    """Returns all samples of the lease and scores them; returns all actions."""
    actions: list[Action] = []
    for index in lease.indices:
        returned = core.handle(inputs.Received(server, generated(lease, index, version)), now)
        actions += returned
        for score in messages_of(returned, ScoreRequest):
            actions += core.handle(inputs.Received("reward-0", scored(score)), now)
    return actions


def update(core: Core, *servers: str) -> list[Action]:
    return [
        action
        for name in servers
        for action in core.handle(inputs.ServerUpdated(name, version=core.version), 0)
    ]


@pytest.mark.parametrize("mode", ["pause", "held_server"])
def test_sample_of_another_version_is_refused_and_generated_again(
    mode: Literal["pause", "held_server"],
) -> None:
    core = core_with_servers(2)
    core.state.version = 1  # the trainer has made a step, and no server has its weights
    event = inputs.EvaluationRequested(0, mode, evaluation_tasks(1))
    [(server, lease)] = leases_of(core.handle(event, 0), "eval")
    actions = core.handle(inputs.Received(server, generated(lease, 0, 0, 1)), 0)
    [error] = [action.error for action in actions if isinstance(action, ReportError)]
    assert "versions 0 to 1, possible are 0 to 0" in error
    [(server, again)] = leases_of(actions, "eval")
    assert (again.group_id, again.attempt) == (lease.group_id, lease.attempt + 1)
    ended = finish(core, again, 0, server)
    [reported] = [action for action in ended if isinstance(action, ReportEvaluated)]
    assert set(reported.sample.versions[3:].tolist()) == {0}


def test_held_server_takes_only_the_evaluation_and_the_others_only_training() -> None:
    core = core_with_servers(3, max_staleness=8)
    leases = leases_of(request(core, "held_server", 9), "eval")
    assert [server for server, _ in leases] == ["rollout-0"] * 4  # its capacity
    admitted = core.handle(inputs.AdmissionOpened(), 0)
    training = leases_of(admitted, "train")
    assert {server for server, _ in training} == {"rollout-1", "rollout-2"}
    assert leases_of(admitted, "eval") == []
    core.state.version = 1
    update(core, "rollout-1", "rollout-2")
    ended: list[Action] = []
    while leases:
        server, lease = leases.pop()
        actions = finish(core, lease, 0, server)
        leases += leases_of(actions, "eval")
        ended += actions
    reported = [action for action in ended if isinstance(action, ReportEvaluated)]
    assert len(reported) == 9 and {int(r.sample.versions.max()) for r in reported} == {0}
    assert ended.count(FinishEvaluation(0, "")) == 1
    assert core.evaluation.held_server() is None
    released = leases_of(ended, "train")
    assert {server for server, _ in released} == {"rollout-0"}  # it serves training again


def test_last_server_of_training_is_never_held() -> None:
    core = core_with_servers(1)
    [end] = request(core, "held_server", 3)
    assert isinstance(end, FinishEvaluation) and "two servers" in end.abandoned
    assert core.state.groups == {}


def test_evaluation_moves_to_another_server_of_its_version() -> None:
    core = core_with_servers(3)
    assert len(leases_of(request(core, "held_server", 2), "eval")) == 2
    moved = leases_of(core.handle(inputs.WorkerLost("rollout-0"), 0), "eval")
    assert [server for server, _ in moved] == ["rollout-1"] * 2
    core.handle(inputs.WorkerLost("rollout-1"), 0)
    assert not core.evaluation.has_server()  # rollout-2 is needed for training
    core.handle(inputs.RolloutJoined("rollout-1", 4), 0)
    moved = leases_of(update(core, "rollout-1"), "eval")  # it has loaded a snapshot
    assert [server for server, _ in moved] == ["rollout-1"] * 2


def test_fenced_server_is_held_no_more() -> None:
    core = core_with_servers(2)
    request(core, "held_server", 2)
    core.handle(inputs.ServerFenced("rollout-0", reason="digest"), 0)
    assert core.evaluation.held_server() is None and not core.evaluation.has_server()


@pytest.mark.parametrize("mode", ["pause", "held_server", "mixed"])
def test_abandoned_evaluation_leaves_nothing_behind(
    mode: Literal["pause", "held_server", "mixed"],
) -> None:
    core = core_with_servers(2, max_staleness=8)
    leases = leases_of(request(core, mode, 20), "eval")
    assert leases
    [end] = [
        action
        for action in core.handle(inputs.EvaluationAbandoned("no server"), 0)
        if isinstance(action, FinishEvaluation)
    ]
    assert end.abandoned == "no server" and core.state.groups == {}
    assert {(w.eval_load, w.is_held) for w in core.fleet.rollout.values()} == {(0, False)}
    server, lease = leases[0]
    assert core.handle(inputs.Received(server, generated(lease, 0, 0)), 0) == []  # fenced
    servers = {server for server, _ in leases_of(core.handle(inputs.AdmissionOpened(), 0), "train")}
    assert servers == {"rollout-0", "rollout-1"}


def test_failed_sample_is_reported_without_reward() -> None:
    core = core_with_servers(1, max_attempts=1)
    [(server, lease)] = leases_of(request(core, "pause", 1), "eval")
    failed = inputs.Received(server, GenerateFailed(lease.key(0), "no memory"))
    reported, end = core.handle(failed, 0)
    assert isinstance(reported, ReportEvaluated) and reported.reward is None
    assert end == FinishEvaluation(0, "")


def training_leases(mode: Literal["mixed"] | None) -> list[tuple[str, int, int]]:
    """Returns the training leases of 12 steps, each as (server, group, time).

    With an evaluation its samples return before those of training.
    """
    core = core_with_servers(2, capacity=8, max_staleness=2)
    found, running = [], []
    actions = request(core, mode, 40) if mode else []
    actions += core.handle(inputs.AdmissionOpened(), 0)
    for now in range(12):
        actions += core.handle(inputs.BatchRequested(0, core.version), now)
        for server, lease in leases_of(actions, "eval")[:3]:
            actions += finish(core, lease, core.version, server, now)
        running += leases_of(actions, "train")
        found += [(server, lease.group_id, now) for server, lease in leases_of(actions, "train")]
        actions = []
        while not core.state.in_batch:
            server, lease = running.pop(0)
            new = finish(core, lease, core.version, server, now)
            running += leases_of(new, "train")
            found += [(server, lease.group_id, now) for server, lease in leases_of(new, "train")]
            actions += [a for a in new if leases_of([a], "eval")]
        step = inputs.Received("trainer-0", StepDone(core.version + 1, {}))
        actions += core.handle(step, now)
        actions += update(core, "rollout-0", "rollout-1")
    assert core.version == 12
    return found


def test_mixed_evaluation_changes_no_admission_lease_or_batch_of_training() -> None:
    without, beside = training_leases(None), training_leases("mixed")
    assert len(without) >= 24
    # groups of the evaluation take numbers: the order of training groups is compared
    number = {group: order for order, group in enumerate(sorted({g for _, g, _ in beside}))}
    assert [(server, number[group], now) for server, group, now in beside] == [
        (server, group, now) for server, group, now in without
    ]


def test_mixed_evaluation_takes_a_share_of_each_server() -> None:
    core = core_with_servers(2, capacity=8)
    leases = leases_of(request(core, "mixed", 40), "eval")
    assert sorted(server for server, _ in leases) == ["rollout-0"] * 2 + ["rollout-1"] * 2
    core.state.version = 1
    update(core, "rollout-0", "rollout-1")
    server, lease = leases[0]
    ended = finish(core, lease, 1, server)  # of any version that was served
    assert len(messages_of(ended, Generate)) == 1
    [reported] = [action for action in ended if isinstance(action, ReportEvaluated)]
    assert reported.sample.newest_version == 1
