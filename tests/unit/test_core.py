"""The core's decisions: admission, leases, scoring, batch selection, dropping and accounting."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from core_builders import (
    LEASE_S,
    SILENCE_S,
    STRAGGLER_S,
    evaluation_tasks,
    finish_lease,
    generated,
    join_workers,
    make_core,
    make_sample,
    messages_of,
    scored,
)
from core_machine import CoreMachine
from hypothesis import settings

from megatron_async_rl.config.algorithm import FilterConfig
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import (
    Action,
    FinishEvaluation,
    ReportDrop,
    ReportError,
    ReportEvaluated,
    Send,
    SendBatch,
    ServerLost,
)
from megatron_async_rl.controller.core.groups import DropReason, GroupState
from megatron_async_rl.controller.filters import filter_rules
from megatron_async_rl.errors import LedgerError
from megatron_async_rl.protocol.messages import (
    Generate,
    Generated,
    GenerateFailed,
    ScoreRequest,
    Shutdown,
    StepDone,
)
from megatron_async_rl.protocol.types import NOT_GENERATED, SampleKey


def test_admission_stops_max_staleness_steps_ahead() -> None:
    core = make_core(max_staleness=1)
    assert len(join_workers(core)) == 4  # (version 0 + eta 1 + 1) * 2 groups
    assert core.leases.next_step == 2


def test_zero_staleness_admits_one_batch_per_version() -> None:
    core = make_core(max_staleness=0)
    leases = join_workers(core)
    assert len(leases) == 2
    for lease in leases:
        finish_lease(core, lease, 0)
    [batch] = core.handle(inputs.BatchRequested(0, 0), 0)
    assert isinstance(batch, SendBatch)
    # no generation while version 0 trains
    assert not messages_of(core.handle(inputs.Tick(), 1), Generate)
    # nor under the server's old weights once it is trained
    assert not messages_of(core.handle(inputs.Received("trainer-0", StepDone(1, {})), 2), Generate)
    core.handle(inputs.UpdateStarted("rollout-0"), 0)
    assert (
        len(messages_of(core.handle(inputs.ServerUpdated("rollout-0", version=1), 3), Generate))
        == 2
    )


@pytest.mark.parametrize("prompts_per_step", [1, 2, 4])
def test_resumed_run_may_have_another_batch_size(prompts_per_step: int) -> None:
    core = make_core(max_staleness=1, prompts_per_step=prompts_per_step)
    state = core.state
    state.version, state.ledger.admitted, state.ledger.trained = 100, 200, 200  # 2 prompts a step
    assert len(join_workers(core, version=100)) == 2 * prompts_per_step


def test_straggler_is_awaited_and_trained_first() -> None:
    core = make_core(max_staleness=0, prompts_per_step=2)
    first, second = join_workers(core)
    finish_lease(core, second, 0)
    assert core.handle(inputs.BatchRequested(0, 0), 0) == []
    [batch] = finish_lease(core, first, 0)
    assert isinstance(batch, SendBatch)
    assert [group.group_id for group in batch.groups] == [first.group_id, second.group_id]


def test_missing_straggler_is_dropped_as_stale_and_replaced() -> None:
    core = make_core(max_staleness=1, wait_for_stragglers=False)
    straggler, *others = join_workers(core)
    for lease in others[:2]:
        finish_lease(core, lease, 0)
    for version in (0, 1):
        batch = next(
            a for a in core.handle(inputs.BatchRequested(0, version), 0) if isinstance(a, SendBatch)
        )
        assert straggler.group_id not in [group.group_id for group in batch.groups]
        core.handle(inputs.Received("trainer-0", StepDone(version + 1, {})), 0)
        for lease in [
            *others[2:],
            *messages_of(
                core.handle(inputs.ServerUpdated("rollout-0", version=version + 1), 0), Generate
            ),
        ]:
            finish_lease(core, lease, version + 1)
        others = []
    finish_lease(core, straggler, 0)
    actions = core.handle(inputs.BatchRequested(0, 2), 0)
    assert [a.reason for a in actions if isinstance(a, ReportDrop)] == [DropReason.STALE]
    core.state.check()


def test_request_of_a_leader_may_overtake_the_report_of_the_step() -> None:
    """Leaders of other replicas neither report steps nor send weights: they ask at once."""
    core = make_core(data_parallel_size=2, max_staleness=3)
    for lease in join_workers(core)[:4]:
        finish_lease(core, lease, 0)
    core.handle(inputs.BatchRequested(0, 0), 0)
    actions = core.handle(inputs.BatchRequested(1, 0), 0)
    assert [a.version for a in actions if isinstance(a, SendBatch)] == [0]
    assert core.handle(inputs.BatchRequested(1, 1), 0) == []
    assert core.handle(inputs.BatchRequested(1, 2), 0) == [] and core.num_fenced_messages == 1
    core.handle(inputs.Received("trainer-0", StepDone(1, {})), 0)
    assert not core.batch_awaited
    actions = core.handle(inputs.BatchRequested(0, 1), 0)
    assert [a.version for a in actions if isinstance(a, SendBatch)] == [1]


def test_weight_source_that_rejoins_leaves_the_request_of_the_leaders() -> None:
    """A source of a later stage joins a restarted controller with its next offer of weights.

    That is, in the middle of an update that was requested while the leaders wait for a batch.
    """
    core = make_core()
    leases = join_workers(core)
    core.handle(inputs.TrainerJoined(0), 0)
    core.handle(inputs.BatchRequested(0, 0), 0)
    core.handle(inputs.BatchesHeld(True), 0)
    core.handle(inputs.TrainerJoined(-1), 0)
    assert core.batch_awaited and core.batches_held
    for lease in leases[:2]:
        finish_lease(core, lease, 0)
    actions = core.handle(inputs.BatchesHeld(False), 0)
    assert [type(action) for action in actions if isinstance(action, SendBatch)] == [SendBatch]
    core.handle(inputs.TrainerJoined(0), 0)
    assert not core.batch_selector.requests


def test_straggler_wait_ends_at_its_deadline() -> None:
    core = make_core(max_staleness=1)
    straggler, second, third, fourth = join_workers(core)
    for lease in (second, third):
        finish_lease(core, lease, 0)
    core.handle(inputs.BatchRequested(0, 0), 0)
    core.handle(inputs.Received("trainer-0", StepDone(1, {})), 0)
    new = messages_of(core.handle(inputs.ServerUpdated("rollout-0", version=1), 0), Generate)
    finish_lease(core, fourth, 1)
    for lease in new:
        finish_lease(core, lease, 1)
    # the straggler's tokens of version 0 can still be trained in this batch, but not later
    assert not [a for a in core.handle(inputs.BatchRequested(0, 1), 0) if isinstance(a, SendBatch)]
    assert not [a for a in core.handle(inputs.Tick(), STRAGGLER_S) if isinstance(a, SendBatch)]
    assert [a for a in core.handle(inputs.Tick(), STRAGGLER_S + 1) if isinstance(a, SendBatch)]
    assert core.state.groups[straggler.group_id].state is GroupState.RUNNING


def test_late_duplicate_and_foreign_replies_are_only_counted() -> None:
    core = make_core()
    lease, *_ = join_workers(core)
    core.handle(inputs.Received("rollout-0", generated(lease, 0, 0)), 0)
    before = core.state.groups[lease.group_id].samples[0]
    for late in (
        ("rollout-0", generated(lease, 0, 5)),  # duplicate
        ("rollout-9", generated(lease, 1, 0)),  # another worker's
        (
            "rollout-0",
            Generated(SampleKey(core.epoch + 1, lease.group_id, lease.attempt, 1), make_sample(0)),
        ),
        (
            "rollout-0",
            Generated(SampleKey(core.epoch, lease.group_id, lease.attempt + 1, 1), make_sample(0)),
        ),
        ("rollout-0", Generated(SampleKey(core.epoch, 999, 1, 1), make_sample(0))),
        ("rollout-0", Generated(lease.key(77), make_sample(0))),
    ):
        assert core.handle(inputs.Received(*late), 0) == []
    assert core.num_fenced_messages == 6
    assert core.state.groups[lease.group_id].samples[0] is before
    assert core.state.groups[lease.group_id].samples[1] is None


def test_samples_of_lost_server_are_requeued_and_returned_kept() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = join_workers(core)
    core.handle(inputs.Received("rollout-0", generated(lease, 0, 0)), 0)
    core.handle(inputs.RolloutJoined("rollout-1", 100), 0)
    core.handle(inputs.ServerUpdated("rollout-1", version=0), 0)
    [again] = messages_of(core.handle(inputs.WorkerLost("rollout-0"), 1), Generate)
    assert (again.group_id, again.attempt, again.indices) == (lease.group_id, 2, [1])
    late = generated(lease, 1, 0)
    assert core.handle(inputs.Received("rollout-0", late), 1) == []


def test_lost_server_is_reported_once_and_only_if_known() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)

    def lost(actions: list[Action]) -> list[str]:
        return [action.worker for action in actions if isinstance(action, ServerLost)]

    assert lost(core.handle(inputs.RolloutJoined("rollout-0", 4), 0)) == []
    # the incarnation before
    assert lost(core.handle(inputs.RolloutJoined("rollout-0", 4), 0)) == ["rollout-0"]
    assert lost(core.handle(inputs.WorkerLost("rollout-0"), 0)) == ["rollout-0"]
    assert (
        lost(core.handle(inputs.WorkerLost("rollout-0"), 0))
        == lost(core.handle(inputs.RolloutJoined("rollout-0", 4), 0))
        == []
    )
    assert (
        lost(core.handle(inputs.RewardJoined("reward-0", 4), 0))
        == lost(core.handle(inputs.WorkerLost("reward-0"), 0))
        == []
    )
    assert (
        lost(core.handle(inputs.ServerFenced("rollout-0", reason="bad digest"), 0))
        == lost(core.handle(inputs.Tick(), SILENCE_S))
        == []
    )
    assert lost(core.handle(inputs.Tick(), SILENCE_S + 1)) == ["rollout-0"]
    assert lost(core.handle(inputs.Tick(), SILENCE_S + 2)) == []


def test_group_is_dropped_with_reason_after_last_attempt() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0, max_attempts=2)
    [lease] = join_workers(core)
    failed = GenerateFailed(lease.key(0), "broken")
    [again] = messages_of(core.handle(inputs.Received("rollout-0", failed), 0), Generate)
    actions = core.handle(inputs.Received("rollout-0", GenerateFailed(again.key(0), "broken")), 0)
    assert [a.reason for a in actions if isinstance(a, ReportDrop)] == [
        DropReason.GENERATION_FAILED
    ]
    assert messages_of(actions, Generate)[0].group_id != lease.group_id  # another is admitted
    assert core.fleet.rollout["rollout-0"].load == 2


def test_expired_lease_starts_a_new_attempt() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = join_workers(core)
    core.fleet.heard("rollout-0", LEASE_S)
    core.fleet.heard("reward-0", LEASE_S)
    assert messages_of(core.handle(inputs.Tick(), LEASE_S), Generate) == []
    assert (
        messages_of(core.handle(inputs.Tick(), LEASE_S + 1), Generate)[0].attempt
        == lease.attempt + 1
    )


def test_failed_scoring_is_retried_then_dropped_never_zero() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = join_workers(core)
    [score] = messages_of(
        core.handle(inputs.Received("rollout-0", generated(lease, 0, 0)), 0), ScoreRequest
    )
    [retry] = messages_of(
        core.handle(inputs.Received("reward-0", scored(score, None)), 0), ScoreRequest
    )
    actions = core.handle(inputs.Received("reward-0", scored(retry, None)), 0)
    assert [a.reason for a in actions if isinstance(a, ReportDrop)] == [
        DropReason.REWARD_UNAVAILABLE
    ]
    assert core.fleet.reward["reward-0"].load == 0


def test_scores_of_lost_reward_worker_are_requested_elsewhere() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = join_workers(core)
    [score] = messages_of(
        core.handle(inputs.Received("rollout-0", generated(lease, 0, 0)), 0), ScoreRequest
    )
    assert messages_of(core.handle(inputs.WorkerLost("reward-0"), 0), ScoreRequest) == []
    assert messages_of(core.handle(inputs.RewardJoined("reward-1", 4), 0), ScoreRequest) == [score]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_reward_is_an_infrastructure_error(reward: float) -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = join_workers(core)
    [score] = messages_of(
        core.handle(inputs.Received("rollout-0", generated(lease, 0, 0)), 0), ScoreRequest
    )
    [retry] = messages_of(
        core.handle(inputs.Received("reward-0", scored(score, reward)), 0), ScoreRequest
    )
    assert retry.key == score.key
    assert core.state.groups[lease.group_id].rewards == [None, None]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ({"logprobs": np.asarray([0, 0, 0, np.nan], np.float32)}, "logprobs that are not finite"),
        ({"logprobs": np.asarray([0, 0, 0, -np.inf], np.float32)}, "logprobs that are not finite"),
        ({"logprobs": np.zeros(3, np.float32)}, "4 ids, 3 logprobs, 4 versions"),
        ({"ids": np.zeros(0, np.int32)}, "0 ids, 4 logprobs, 4 versions"),
        ({"versions": np.full(4, NOT_GENERATED, np.int32)}, "no token was generated"),
        (
            {"versions": np.asarray([-1, -1, -1, 7], np.int32)},
            "versions 7 to 7, possible are 0 to 0",
        ),
    ],
)
def test_impossible_sample_is_never_trained(damage: dict[str, np.ndarray], fault: str) -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = join_workers(core)
    bad = msgspec.structs.replace(make_sample(0), **damage)
    reply = Generated(lease.key(0), bad)
    actions = core.handle(inputs.Received("rollout-0", reply), 0)
    [again] = messages_of(actions, Generate)
    error = ReportError(f"rollout-0: sample {lease.group_id}.0 is refused: {fault}")
    assert error in actions
    assert (again.attempt, again.indices) == (lease.attempt + 1, [0, 1])
    assert core.state.groups[lease.group_id].samples == [None, None]


def test_equal_reward_groups_are_dropped_only_if_configured() -> None:
    rules = filter_rules(FilterConfig(drop_equal_rewards=True))
    core = make_core(prompts_per_step=1, max_staleness=0, filter_rules=rules)
    [lease] = join_workers(core)
    actions = finish_lease(core, lease, 0)
    assert [a.reason for a in actions if isinstance(a, ReportDrop)] == [DropReason.EQUAL_REWARDS]


@pytest.mark.parametrize(
    "band, dropped", [((0.5, 0.9), True), ((0.0, 0.4), True), ((1.0, 1.0), False)]
)
def test_groups_outside_success_rate_band_are_dropped(
    band: tuple[float, float], dropped: bool
) -> None:
    rules = filter_rules(FilterConfig(success_rate_min=band[0], success_rate_max=band[1]))
    core = make_core(prompts_per_step=1, max_staleness=0, filter_rules=rules)
    [lease] = join_workers(core)
    actions = finish_lease(core, lease, 0)  # every reward is 1
    assert [a.reason for a in actions if isinstance(a, ReportDrop)] == [
        DropReason.SUCCESS_RATE
    ] * dropped


def test_fenced_server_loses_its_work_and_gets_none() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = join_workers(core)
    assert core.handle(inputs.ServerFenced("rollout-0", reason="digest"), 0) == [
        ReportError("rollout-0 is fenced: digest"),
        Send("rollout-0", Shutdown("fenced: digest")),
    ]
    assert core.state.groups[lease.group_id].state is GroupState.QUEUED
    assert core.fleet.rollout.least_loaded(1, 0) is None


def test_evaluation_delays_training_and_returns_every_group() -> None:
    core = make_core()
    core.admitting = False
    join_workers(core)
    core.admitting = True
    request = inputs.EvaluationRequested(0, "pause", evaluation_tasks(3))
    leases = messages_of(core.handle(request, 0), Generate)
    assert [lease.purpose for lease in leases] == ["eval"] * 3
    assert {lease.temperature for lease in leases} == {0.0}
    actions = [action for lease in leases for action in finish_lease(core, lease, 0)]
    assert [a.reward for a in actions if isinstance(a, ReportEvaluated)] == [1.0] * 3
    assert FinishEvaluation(0, "") in actions
    assert messages_of(actions, Generate)  # admission continues
    assert core.state.ledger.admitted == core.state.pending


def test_ledger_balances_at_the_end_of_the_run() -> None:
    core = make_core()
    join_workers(core)
    core.handle(inputs.RunEnded(), 0)
    assert core.state.pending == 0
    assert core.state.ledger.dropped[DropReason.RUN_ENDED] == core.state.ledger.admitted == 4


def test_lost_group_raises_a_ledger_error_by_name() -> None:
    core = make_core()
    join_workers(core)
    core.state.groups.pop(next(iter(core.state.groups)))
    with pytest.raises(LedgerError, match="admitted 4"):
        core.state.check()


TestCoreMachine = CoreMachine.TestCase
TestCoreMachine.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
