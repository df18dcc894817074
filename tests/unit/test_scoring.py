"""Scoring requests of workflows: the core's part."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from core_builders import (
    LEASE_S,
    generated,
    join_workers,
    make_core,
    make_sample,
    messages_of,
    restart_core,
)

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import ReportScoringError
from megatron_async_rl.controller.core.groups import GroupState
from megatron_async_rl.controller.journal.events import SampleScored
from megatron_async_rl.protocol.messages import (
    Generate,
    Generated,
    GenerateFailed,
    ScoreRequest,
    ScoreResult,
)
from megatron_async_rl.reward import scoring_process


def ask(lease: Generate, index: int = 0, number: int = 1) -> ScoreRequest:
    return ScoreRequest(lease.key(index), "is it 2?", call=number)


def test_workflow_score_request_is_answered_and_changes_nothing() -> None:
    core = make_core()
    [lease, *_] = join_workers(core)
    core.handle(inputs.RewardJoined("reward-0", 1), 0)
    [question] = messages_of(core.handle(inputs.Received("rollout-0", ask(lease)), 1), ScoreRequest)
    assert (question.response, question.row, question.call) == ("is it 2?", lease.prompt.row, 1)
    # the only reward worker is busy
    assert (
        messages_of(core.handle(inputs.Received("rollout-0", ask(lease, 1)), 1), ScoreRequest) == []
    )
    reply = ScoreResult(lease.key(0), 0.5, call=1)
    actions = core.handle(inputs.Received("reward-0", reply), 2)
    assert messages_of(actions, ScoreResult) == [reply]
    # free for the next request
    assert [score.key.index for score in messages_of(actions, ScoreRequest)] == [1]
    assert core.state.groups[lease.group_id].rewards == [None] * len(lease.indices)
    assert (
        messages_of(core.handle(inputs.Received("reward-0", reply), 3), ScoreResult) == []
        and core.num_fenced_messages == 1
    )


def test_unanswered_score_request_returns_the_reason() -> None:
    core = make_core()  # two attempts
    [lease, *_] = join_workers(core)
    core.handle(inputs.RewardJoined("reward-1", 1), 0)
    core.handle(inputs.Received("rollout-0", ask(lease)), 1)
    # by another reward worker; this is no failed attempt
    [again] = messages_of(core.handle(inputs.WorkerLost("reward-0"), 2), ScoreRequest)
    broken = ScoreResult(lease.key(0), None, "it broke", call=again.call)
    assert messages_of(core.handle(inputs.Received("reward-1", broken), 2), ScoreRequest) == [again]
    [answer] = messages_of(core.handle(inputs.Received("reward-1", broken), 3), ScoreResult)
    assert answer.reward is None and answer.error == "it broke"
    assert core.fleet.reward["reward-1"].load == 0


def test_non_finite_score_is_an_error() -> None:
    core = make_core()
    [lease, *_] = join_workers(core)
    core.handle(inputs.Received("rollout-0", ask(lease)), 1)
    nothing = ScoreResult(lease.key(0), math.nan, call=1)
    # one more attempt
    assert messages_of(core.handle(inputs.Received("reward-0", nothing), 2), ScoreResult) == []
    [answer] = messages_of(core.handle(inputs.Received("reward-0", nothing), 3), ScoreResult)
    assert answer.reward is None and "nan" in answer.error


def test_failed_attempt_that_no_worker_reported_is_reported_with_its_reason() -> None:
    core = make_core(heartbeat_timeout_s=1e9)
    [lease, *_] = join_workers(core)
    core.handle(inputs.Received("rollout-0", generated(lease, 0, 0)), 0)
    wrong = [
        ScoreResult(lease.key(0), math.nan),
        ScoreResult(lease.key(0), 1.0, turn_rewards=[1.0] * 2),
    ]
    reasons = ["the reward is nan", "2 rewards for a sample of 1 turns"]
    for result, reason in zip(wrong, reasons, strict=True):
        actions = core.handle(inputs.Received("reward-0", result), 0)
        [report] = [action for action in actions if isinstance(action, ReportScoringError)]
        assert reason in report.error and report.where.startswith("reward-0: no score")


def test_numbers_that_no_float_holds_are_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[Any] = [10**400, [1.0, -(10**400)], [1e308, 1e308], [1.0, math.nan]]
    for value in returned:
        monkeypatch.setattr(scoring_process, "_function", lambda p, r, row, value=value: value)
        outcome = scoring_process.score_custom("", "", {}, [])
        assert outcome.reward is None and "the reward function returned" in outcome.error
    monkeypatch.setattr(scoring_process, "_function", lambda p, r, row: (0.5, {"m": 10**400}))
    outcome = scoring_process.score_custom("", "", {}, [])
    assert outcome.reward == 0.5 and outcome.metrics == {"m": math.inf}


def test_score_request_ends_with_its_lease() -> None:
    core = make_core(heartbeat_timeout_s=1e9)
    [lease, *_] = join_workers(core)
    core.handle(inputs.Received("rollout-0", ask(lease)), 1)
    [answer] = messages_of(core.handle(inputs.Tick(), 1 + LEASE_S + 1), ScoreResult)
    assert "has ended" in answer.error
    assert core.fleet.reward["reward-0"].load == 0


def test_score_request_of_an_ended_lease_is_rejected() -> None:
    core = make_core()
    [lease, *_] = join_workers(core)
    core.handle(inputs.WorkerLost("reward-0"), 0)
    # it waits for a reward worker
    assert core.handle(inputs.Received("rollout-0", ask(lease)), 1) == []
    core.handle(inputs.Received("rollout-0", GenerateFailed(lease.key(0), "no")), 2)
    [answer] = messages_of(core.handle(inputs.RewardJoined("reward-0", 1), 3), ScoreResult)
    assert "has ended" in answer.error
    [answer] = messages_of(
        core.handle(inputs.Received("rollout-0", ask(lease, number=2)), 4), ScoreResult
    )
    assert answer.call == 2 and "has ended" in answer.error and core.num_fenced_messages == 1


@pytest.mark.parametrize("crashed", [False, True])
def test_reward_that_an_agent_gave_is_recorded_and_not_computed(crashed: bool) -> None:
    core = make_core(single_turn=False, max_sequences=64)
    lease = join_workers(core)[0]
    recorded = core.state.take_events()
    for index, reward in zip(lease.indices, (0.25, 0.75), strict=True):
        sample = msgspec.structs.replace(make_sample(0), reward=reward)
        reply = Generated(lease.key(index), sample)
        actions = core.handle(inputs.Received("rollout-0", reply), 0.0)
        assert not messages_of(actions, ScoreRequest)
        recorded += core.state.take_events()
    if crashed:  # just before the rewards were recorded
        recorded = [event for event in recorded if not isinstance(event, SampleScored)]
    else:
        assert sum(isinstance(event, SampleScored) for event in recorded) == 2
    restored = restart_core(core, recorded)
    group = restored.state.groups[lease.group_id]
    assert group.rewards == [0.25, 0.75] and group.state is GroupState.READY
