"""The pure core under a greedy and hostile world: books balance, no token is trained too late, late messages do nothing."""

from __future__ import annotations

import itertools
import random

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megatron_async_rl.controller.core.actions import (
    Action,
    Dropped,
    EvalFinished,
    Send,
    SendBatch,
    ServerLost,
)
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.groups import GroupState
from megatron_async_rl.controller.core.ledger import DropReason
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.errors import ConservationError
from megatron_async_rl.protocol.messages import Generate, Generated, GenerateFailed, Score, Scored
from megatron_async_rl.protocol.types import NOT_GENERATED, Prompt, Sample

LEASE_S, SILENCE_S, STRAGGLER_S = 100.0, 60.0, 20.0


def rules(**changes: object) -> CoreSettings:
    standard: dict[str, object] = {
        "prompts_per_step": 2,
        "samples_per_prompt": 2,
        "max_staleness": 1,
        "wait_for_stragglers": True,
        "straggler_timeout_s": STRAGGLER_S,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "eval_temperature": 0.0,
        "lease_timeout_s": LEASE_S,
        "max_attempts": 3,
        "max_verdict_attempts": 2,
        "drop_equal_rewards": False,
        "heartbeat_timeout_s": SILENCE_S,
        "steps": 1000,
        "data_parallel_size": 1,
    }
    return CoreSettings(**(standard | changes))  # type: ignore[arg-type]


def make_core(**changes: object) -> Core:
    numbers = itertools.count()
    core = Core(
        rules(**changes),
        lambda: Prompt(str(next(numbers)), np.arange(3, dtype=np.int32), {"answer": "1"}),
    )
    core.admitting = True
    return core


def sample(*versions: int) -> Sample:
    """Three prompt tokens, then one token of each version."""
    all_versions = np.asarray([NOT_GENERATED] * 3 + list(versions), np.int32)
    zeros = np.zeros(len(all_versions), np.float32)
    return Sample(
        ids=np.arange(len(all_versions), dtype=np.int32),
        logprobs=zeros,
        versions=all_versions,
        stop="stop",
        text="1",
    )


def messages(actions: list[Action], kind: type) -> list:
    return [
        action.message
        for action in actions
        if isinstance(action, Send) and isinstance(action.message, kind)
    ]


def generated(lease: Generate, index: int, *versions: int) -> Generated:
    return Generated(lease.epoch, lease.group_id, lease.attempt, index, sample(*versions))


def scored(score: Score, reward: float | None = 1.0) -> Scored:
    return Scored(score.epoch, score.group_id, score.attempt, score.index, reward)


def serve(
    core: Core, capacity: int = 100, name: str = "rollout-0", version: int = 0
) -> list[Generate]:
    core.reward_joined("reward-0", 100, 0)
    core.rollout_joined(name, capacity, 0)
    return messages(core.serving(name, version, 0), Generate)


def finish(
    core: Core, lease: Generate, version: int, now: float = 0, worker: str = "rollout-0"
) -> list[Action]:
    """All samples of a lease come back and are judged."""
    actions: list[Action] = []
    for index in lease.indices:
        for score in messages(core.generated(worker, generated(lease, index, version), now), Score):
            actions += core.scored("reward-0", scored(score), now)
    return actions


def test_admission_stops_eta_steps_ahead_of_training() -> None:
    core = make_core(max_staleness=1)
    assert len(serve(core)) == 4  # (version 0 + eta 1 + 1) * 2 groups
    assert core.next_step == 2


def test_eta_zero_admits_one_batch_per_version() -> None:
    core = make_core(max_staleness=0)
    leases = serve(core)
    assert len(leases) == 2
    for lease in leases:
        finish(core, lease, 0)
    [cut] = core.batch_wanted(0, 0, 0)
    assert isinstance(cut, SendBatch)
    assert not messages(core.tick(1), Generate)  # nothing is generated while version 0 trains
    assert not messages(
        core.step_done(1, 2), Generate
    )  # nor on the server's old weights once it is trained
    core.updating("rollout-0")
    assert len(messages(core.serving("rollout-0", 1, 3), Generate)) == 2


def test_a_straggler_is_waited_for_and_then_trained_first() -> None:
    core = make_core(max_staleness=0, prompts_per_step=2)
    first, second = serve(core)
    finish(core, second, 0)
    assert core.batch_wanted(0, 0, 0) == []
    [cut] = finish(core, first, 0)
    assert isinstance(cut, SendBatch)
    assert [group.group_id for group in cut.groups] == [first.group_id, second.group_id]


def test_a_straggler_that_stays_out_is_dropped_as_stale_and_its_place_given_back() -> None:
    core = make_core(max_staleness=1, wait_for_stragglers=False)
    straggler, *others = serve(core)
    for lease in others[:2]:
        finish(core, lease, 0)
    for version in (0, 1):
        cut = next(a for a in core.batch_wanted(0, version, 0) if isinstance(a, SendBatch))
        assert straggler.group_id not in [group.group_id for group in cut.groups]
        core.step_done(version + 1, 0)
        for lease in [*others[2:], *messages(core.serving("rollout-0", version + 1, 0), Generate)]:
            finish(core, lease, version + 1)
        others = []
    finish(core, straggler, 0)
    actions = core.batch_wanted(0, 2, 0)
    assert [a.reason for a in actions if isinstance(a, Dropped)] == [DropReason.STALE]
    core.check()


def test_waiting_for_a_straggler_ends_at_its_deadline() -> None:
    core = make_core(max_staleness=1)
    straggler, second, third, _fourth = serve(core)
    for lease in (second, third):
        finish(core, lease, 0)
    core.batch_wanted(0, 0, 0)
    core.step_done(1, 0)
    new = messages(core.serving("rollout-0", 1, 0), Generate)
    finish(core, _fourth, 1)
    for lease in new:
        finish(core, lease, 1)
    assert not [
        a for a in core.batch_wanted(0, 1, 0) if isinstance(a, SendBatch)
    ]  # version 0 tokens have a last chance
    assert not [a for a in core.tick(STRAGGLER_S) if isinstance(a, SendBatch)]
    assert [a for a in core.tick(STRAGGLER_S + 1) if isinstance(a, SendBatch)]
    assert core.groups[straggler.group_id].state is GroupState.RUNNING


def test_late_duplicate_and_foreign_replies_change_a_counter_and_nothing_else() -> None:
    core = make_core()
    lease, *_ = serve(core)
    core.generated("rollout-0", generated(lease, 0, 0), 0)
    before = core.groups[lease.group_id].samples[0]
    for late in (
        ("rollout-0", generated(lease, 0, 5)),  # duplicate
        ("rollout-9", generated(lease, 1, 0)),  # another worker's
        ("rollout-0", Generated(core.epoch + 1, lease.group_id, lease.attempt, 1, sample(0))),
        ("rollout-0", Generated(core.epoch, lease.group_id, lease.attempt + 1, 1, sample(0))),
        ("rollout-0", Generated(core.epoch, 999, 1, 1, sample(0))),
        ("rollout-0", Generated(core.epoch, lease.group_id, lease.attempt, 77, sample(0))),
    ):
        assert core.generated(*late, 0) == []
    assert core.num_fenced_messages == 6
    assert core.groups[lease.group_id].samples[0] is before
    assert core.groups[lease.group_id].samples[1] is None


def test_a_lost_server_s_samples_go_to_another_and_what_is_back_stays() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = serve(core)
    core.generated("rollout-0", generated(lease, 0, 0), 0)
    core.rollout_joined("rollout-1", 100, 0)
    core.serving("rollout-1", 0, 0)
    [again] = messages(core.worker_lost("rollout-0", 1), Generate)
    assert (again.group_id, again.attempt, again.indices) == (lease.group_id, 2, [1])
    assert (
        core.generated("rollout-0", generated(lease, 1, 0), 1) == []
    )  # the lost one speaks up: too late


def test_that_a_server_is_lost_is_said_once_and_only_of_one_that_was_there() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)

    def said(actions: list[Action]) -> list[str]:
        return [action.name for action in actions if isinstance(action, ServerLost)]

    assert said(core.rollout_joined("rollout-0", 4, 0)) == []
    assert said(core.rollout_joined("rollout-0", 4, 0)) == ["rollout-0"]  # the life before
    assert said(core.worker_lost("rollout-0", 0)) == ["rollout-0"]
    assert (
        said(core.worker_lost("rollout-0", 0)) == said(core.rollout_joined("rollout-0", 4, 0)) == []
    )
    assert said(core.reward_joined("reward-0", 4, 0)) == said(core.worker_lost("reward-0", 0)) == []
    assert said(core.fenced("rollout-0", "bad digest", 0)) == said(core.tick(SILENCE_S)) == []
    assert said(core.tick(SILENCE_S + 1)) == ["rollout-0"]
    assert said(core.tick(SILENCE_S + 2)) == []


def test_a_group_is_dropped_after_the_last_attempt_with_its_reason() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0, max_attempts=2)
    [lease] = serve(core)
    failed = GenerateFailed(lease.epoch, lease.group_id, lease.attempt, 0, "broken")
    [again] = messages(core.generate_failed("rollout-0", failed, 0), Generate)
    actions = core.generate_failed(
        "rollout-0", GenerateFailed(again.epoch, again.group_id, again.attempt, 0, "broken"), 0
    )
    assert [a.reason for a in actions if isinstance(a, Dropped)] == [DropReason.GENERATION_FAILED]
    assert messages(actions, Generate)[0].group_id != lease.group_id  # its place is given back
    assert core.fleet.rollout["rollout-0"].load == 2


def test_a_late_lease_goes_to_a_new_attempt() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = serve(core)
    core.fleet.heard("rollout-0", LEASE_S)
    core.fleet.heard("reward-0", LEASE_S)
    assert messages(core.tick(LEASE_S), Generate) == []
    assert messages(core.tick(LEASE_S + 1), Generate)[0].attempt == lease.attempt + 1


def test_a_broken_judge_is_retried_then_the_group_dropped_and_never_scored_zero() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = serve(core)
    [score] = messages(core.generated("rollout-0", generated(lease, 0, 0), 0), Score)
    [retry] = messages(core.scored("reward-0", scored(score, None), 0), Score)
    actions = core.scored("reward-0", scored(retry, None), 0)
    assert [a.reason for a in actions if isinstance(a, Dropped)] == [DropReason.REWARD_UNAVAILABLE]
    assert core.fleet.reward["reward-0"].load == 0


def test_a_lost_judge_s_verdicts_are_asked_of_another() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = serve(core)
    [score] = messages(core.generated("rollout-0", generated(lease, 0, 0), 0), Score)
    assert messages(core.worker_lost("reward-0", 0), Score) == []
    assert messages(core.reward_joined("reward-1", 4, 0), Score) == [score]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_no_number_is_a_broken_judge(reward: float) -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = serve(core)
    [score] = messages(core.generated("rollout-0", generated(lease, 0, 0), 0), Score)
    [retry] = messages(core.scored("reward-0", scored(score, reward), 0), Score)
    assert (retry.group_id, retry.index) == (score.group_id, score.index)
    assert core.groups[lease.group_id].rewards == [None, None]


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
def test_a_sample_that_no_engine_can_have_made_is_never_trained(
    damage: dict[str, np.ndarray], fault: str
) -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = serve(core)
    bad = msgspec.structs.replace(sample(0), **damage)
    reply = Generated(lease.epoch, lease.group_id, lease.attempt, 0, bad)
    [again] = messages(core.generated("rollout-0", reply, 0), Generate)
    assert core.last_fault == f"rollout-0: sample {lease.group_id}.0 is refused: {fault}"
    assert (again.attempt, again.indices) == (lease.attempt + 1, [0, 1])
    assert core.groups[lease.group_id].samples == [None, None]


def test_groups_with_equal_rewards_are_dropped_only_when_asked() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0, drop_equal_rewards=True)
    [lease] = serve(core)
    actions = finish(core, lease, 0)
    assert [a.reason for a in actions if isinstance(a, Dropped)] == [DropReason.EQUAL_REWARDS]


@pytest.mark.parametrize(
    "band, dropped", [((0.5, 0.9), True), ((0.0, 0.4), True), ((1.0, 1.0), False)]
)
def test_groups_outside_the_band_of_success_rates_are_dropped(
    band: tuple[float, float], dropped: bool
) -> None:
    core = make_core(prompts_per_step=1, max_staleness=0, success_rates=band)
    [lease] = serve(core)
    actions = finish(core, lease, 0)  # every reward is 1
    assert [a.reason for a in actions if isinstance(a, Dropped)] == [
        DropReason.SUCCESS_RATE
    ] * dropped


def test_a_fenced_server_keeps_no_work_and_gets_none() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    [lease] = serve(core)
    assert core.fenced("rollout-0", "digest", 0) == []
    assert core.groups[lease.group_id].state is GroupState.QUEUED
    assert core.fleet.free_server(1, 0) is None


def test_evaluation_holds_training_leases_back_and_returns_every_group() -> None:
    core = make_core()
    core.admitting = False
    serve(core)
    core.admitting = True
    prompts = [Prompt(str(i), np.arange(3, dtype=np.int32), {"answer": "1"}) for i in range(3)]
    leases = messages(core.start_eval(prompts, 0), Generate)
    assert [lease.purpose for lease in leases] == ["eval"] * 3
    assert {lease.temperature for lease in leases} == {0.0}
    actions = [action for lease in leases for action in finish(core, lease, 0)]
    [result] = [action for action in actions if isinstance(action, EvalFinished)]
    assert len(result.groups) == 3
    assert messages(actions, Generate)  # the gate is open again
    assert core.ledger.admitted == core.pending


def test_the_books_close_when_the_run_ends() -> None:
    core = make_core()
    serve(core)
    core.end()
    assert core.pending == 0
    assert core.ledger.dropped[DropReason.RUN_ENDED] == core.ledger.admitted == 4


def test_a_lost_group_breaks_the_books_by_name() -> None:
    core = make_core()
    serve(core)
    core.groups.pop(next(iter(core.groups)))
    with pytest.raises(ConservationError, match="admitted 4"):
        core.check()


class World(RuleBasedStateMachine):
    """Servers, judges and a trainer in any order, with losses, duplicates, broken judges and time passing."""

    @initialize(
        eta=st.integers(0, 3), wait=st.booleans(), equal=st.booleans(), seed=st.integers(0, 1 << 20)
    )
    def begin(self, eta: int, wait: bool, equal: bool, seed: int) -> None:
        self.core = make_core(
            max_staleness=eta,
            wait_for_stragglers=wait,
            drop_equal_rewards=equal,
            lease_timeout_s=30.0,
        )
        self.random = random.Random(seed)
        self.now = 0.0
        self.leases: list[tuple[str, Generate]] = []
        self.scores: list[tuple[str, Score]] = []
        self.trained: list[int] = []
        self.cut: SendBatch | None = None
        self.join_rollout()
        self.take(self.core.reward_joined("reward-0", 8, 0.0))

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, SendBatch):
                self.check_cut(action)
            elif isinstance(action, Send) and isinstance(action.message, Generate):
                self.leases.append((action.worker, action.message))
            elif isinstance(action, Send):
                self.scores.append((action.worker, action.message))

    def check_cut(self, cut: SendBatch) -> None:
        assert self.cut is None and cut.version == self.core.version
        assert len(cut.groups) == self.core.rules.prompts_per_step
        for group in cut.groups:
            assert None not in group.samples and None not in group.rewards
            assert group.group_id not in self.trained, "trained twice"
            assert (
                cut.version - min(s.oldest_version for s in group.samples)
                <= self.core.rules.max_staleness
            ), "stale"
            self.trained.append(group.group_id)
        self.cut = cut

    @precondition(lambda self: len(self.core.fleet.rollout) < 3)
    @rule()
    def join_rollout(self) -> None:
        name = f"rollout-{self.random.randrange(100)}"
        self.take(self.core.rollout_joined(name, self.random.choice([2, 5]), self.now))
        self.take(self.core.serving(name, self.core.version, self.now))

    @precondition(lambda self: self.core.fleet.rollout)
    @rule()
    def lose_or_fence_a_server(self) -> None:
        name = self.random.choice(list(self.core.fleet.rollout))
        event = self.random.choice(
            [self.core.worker_lost, lambda n, t: self.core.fenced(n, "bad digest", t)]
        )
        self.take(event(name, self.now))

    @precondition(lambda self: self.leases)
    @rule(times=st.integers(1, 2), spans_versions=st.booleans())
    def generate(self, times: int, spans_versions: bool) -> None:
        worker, lease = self.random.choice(self.leases)
        first = (
            self.core.groups[lease.group_id].floor_version
            if lease.group_id in self.core.groups
            else 0
        )
        versions = sorted({first, self.core.version}) if spans_versions else [first]
        reply = generated(lease, self.random.choice(lease.indices), *versions)
        for _ in range(times):
            self.take(self.core.generated(worker, reply, self.now))

    @precondition(lambda self: self.leases)
    @rule()
    def fail(self) -> None:
        worker, lease = self.random.choice(self.leases)
        failed = GenerateFailed(lease.epoch, lease.group_id, lease.attempt, lease.indices[0], "x")
        self.take(self.core.generate_failed(worker, failed, self.now))

    @precondition(lambda self: self.scores)
    @rule(verdict=st.sampled_from([0.0, 1.0, 1.0, None]), again=st.booleans())
    def judge(self, verdict: float | None, again: bool) -> None:
        worker, score = self.random.choice(self.scores)
        for _ in range(1 + again):
            self.take(self.core.scored(worker, scored(score, verdict), self.now))

    @precondition(lambda self: self.cut is None)
    @rule()
    def want_a_batch(self) -> None:
        self.take(self.core.batch_wanted(0, self.core.version, self.now))

    @precondition(lambda self: self.cut is not None)
    @rule()
    def finish_the_step(self) -> None:
        assert self.cut is not None
        self.cut = None
        self.take(self.core.step_done(self.core.version + 1, self.now))
        for name, worker in list(self.core.fleet.rollout.items()):
            if not worker.reason:
                self.core.updating(name)
                self.take(self.core.serving(name, self.core.version, self.now))

    @rule(seconds=st.sampled_from([0.5, 10.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for name in [*self.core.fleet.rollout, *self.core.fleet.reward]:
            self.core.fleet.heard(name, self.now)
        self.take(self.core.tick(self.now))

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "core"):
            self.core.check()
            limit = (
                self.core.version + self.core.rules.max_staleness + 1
            ) * self.core.rules.prompts_per_step
            assert self.core.ledger.trained + self.core.pending <= limit, "admitted past eta"

    @invariant()
    def load_is_what_is_out(self) -> None:
        if hasattr(self, "core"):
            for name, worker in self.core.fleet.rollout.items():
                running = [
                    g
                    for g in self.core.groups.values()
                    if g.worker == name and g.state is GroupState.RUNNING
                ]
                assert worker.load == sum(len(group.missing) for group in running)


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
