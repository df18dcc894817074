"""A hypothesis state machine around the core: servers, reward workers, a trainer in any order."""

from __future__ import annotations

import math
import random

import msgspec
from core_builders import generated, make_core, make_sample, scored
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megatron_async_rl.config.algorithm import FilterConfig
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import Action, Send, SendBatch
from megatron_async_rl.controller.core.groups import GroupState
from megatron_async_rl.controller.filters import filter_rules
from megatron_async_rl.controller.journal.events import PartialSaved, SampleReturned
from megatron_async_rl.protocol.messages import (
    Generate,
    Generated,
    GenerateFailed,
    Heartbeat,
    Message,
    PartialSample,
    ScoreRequest,
    StepDone,
)
from megatron_async_rl.protocol.types import Partial


class CoreMachine(RuleBasedStateMachine):
    """Loses and duplicates messages, fails samples and scores, removes servers, lets time pass."""

    @initialize(
        max_staleness=st.integers(0, 3),
        wait=st.booleans(),
        equal=st.booleans(),
        kv_lease_limit=st.sampled_from([None, 0.5, 1.0]),
        leaders=st.integers(1, 3),
        seed=st.integers(0, 1 << 20),
    )
    def begin(
        self,
        max_staleness: int,
        wait: bool,
        equal: bool,
        kv_lease_limit: float | None,
        leaders: int,
        seed: int,
    ) -> None:
        self.core = make_core(
            max_staleness=max_staleness,
            wait_for_stragglers=wait,
            filter_rules=filter_rules(FilterConfig(drop_equal_rewards=equal)),
            lease_timeout_s=30.0,
            kv_lease_limit=kv_lease_limit,
            data_parallel_size=leaders,
        )
        self.leaders = range(leaders)
        self.random = random.Random(seed)
        self.now = 0.0
        self.leases: list[tuple[str, Generate]] = []
        self.scores: list[tuple[str, ScoreRequest]] = []
        self.trained: list[int] = []
        self.batch: SendBatch | None = None
        self.join_rollout()
        self.take(self.core.handle(inputs.RewardJoined("reward-0", 8), 0.0))

    def take(self, actions: list[Action]) -> None:
        self.check_kv_cache(actions)
        for action in actions:
            if isinstance(action, SendBatch):
                self.check_batch(action)
            elif isinstance(action, Send) and isinstance(action.message, Generate):
                self.leases.append((action.worker, action.message))
            elif isinstance(action, Send) and isinstance(action.message, ScoreRequest):
                self.scores.append((action.worker, action.message))

    def check_kv_cache(self, actions: list[Action]) -> None:
        """The samples of a server with several groups are expected to fit into its KV cache.

        The prompt of the group leased last may exceed it.
        """
        sent = [a for a in actions if isinstance(a, Send) and isinstance(a.message, Generate)]
        for action in sent:
            server = self.core.fleet.rollout[action.worker]
            lease = action.message
            leased = [a.message for a in sent if a.worker == action.worker]
            if server.kv_tokens is None or server.load == len(leased[0].indices):
                continue  # not known, or it had no sample
            tokens = server.load * self.core.state.lengths.running_tokens + server.prompt_tokens
            assert not server.has_pressure
            assert tokens - len(lease.prompt.ids) <= server.kv_tokens + 1e-9

    def check_batch(self, batch: SendBatch) -> None:
        assert self.batch is None and batch.version == self.core.version
        assert len(batch.groups) == self.core.settings.prompts_per_step
        for group in batch.groups:
            assert None not in group.samples and None not in group.rewards
            assert group.group_id not in self.trained, "trained twice"
            assert (
                batch.version - min(s.oldest_version for s in group.samples)
                <= self.core.settings.max_staleness
            ), "stale"
            self.trained.append(group.group_id)
        self.batch = batch

    @precondition(lambda self: len(self.core.fleet.rollout) < 3)
    @rule()
    def join_rollout(self) -> None:
        name = f"rollout-{self.random.randrange(100)}"
        self.take(
            self.core.handle(inputs.RolloutJoined(name, self.random.choice([2, 5])), self.now)
        )
        self.take(self.core.handle(inputs.ServerUpdated(name, version=self.core.version), self.now))

    @precondition(lambda self: self.core.fleet.rollout)
    @rule()
    def lose_or_fence_a_server(self) -> None:
        name = self.random.choice(list(self.core.fleet.rollout))
        event = self.random.choice(
            [inputs.WorkerLost(name), inputs.ServerFenced(name, reason="bad digest")]
        )
        self.take(self.core.handle(event, self.now))

    @precondition(lambda self: self.core.fleet.rollout)
    @rule(capacity=st.integers(0, 60), use=st.sampled_from([0.0, 0.6, 1.0]), queued=st.booleans())
    def report_kv_cache(self, capacity: int, use: float, queued: bool) -> None:
        name = self.random.choice(list(self.core.fleet.rollout))
        engine = {"kv_capacity_tokens": capacity, "kv_use_fraction": use}
        heartbeat = Heartbeat(engine=engine | {"queued_requests": float(queued)})
        self.take(self.core.handle(inputs.Received(name, heartbeat), self.now))

    @precondition(lambda self: self.leases)
    @rule(times=st.integers(1, 2), spans_versions=st.booleans())
    def generate(self, times: int, spans_versions: bool) -> None:
        worker, lease = self.random.choice(self.leases)
        first = (
            self.core.state.groups[lease.group_id].floor_version
            if lease.group_id in self.core.state.groups
            else 0
        )
        versions = sorted({first, self.core.version}) if spans_versions else [first]
        reply = generated(lease, self.random.choice(lease.indices), *versions)
        for _ in range(times):
            self.take(self.core.handle(inputs.Received(worker, reply), self.now))

    @precondition(lambda self: self.leases)
    @rule()
    def finish_a_group(self) -> None:
        """Returns and scores all samples of a lease; by `generate` alone few runs have a batch."""
        for worker, lease in self.leases:
            reply = generated(lease, lease.indices[0], lease.floor_version)
            if group := self.core.leases.group_of(worker, reply):
                break
        else:
            return
        for index in group.missing:
            reply = generated(lease, index, lease.floor_version)
            self.take(self.core.handle(inputs.Received(worker, reply), self.now))
        for scorer, request in self.scores:
            if request.key.group_id == group.group_id:
                result = scored(request, float(request.key.index))
                self.take(self.core.handle(inputs.Received(scorer, result), self.now))

    @precondition(lambda self: self.leases)
    @rule()
    def fail(self) -> None:
        worker, lease = self.random.choice(self.leases)
        failed = GenerateFailed(lease.key(lease.indices[0]), "x")
        self.take(self.core.handle(inputs.Received(worker, failed), self.now))

    @precondition(lambda self: self.scores)
    @rule(reward=st.sampled_from([0.0, 1.0, 1.0, None]), again=st.booleans())
    def score(self, reward: float | None, again: bool) -> None:
        worker, request = self.random.choice(self.scores)
        for _ in range(1 + again):
            self.take(self.core.handle(inputs.Received(worker, scored(request, reward)), self.now))

    @precondition(lambda self: self.leases)
    @rule(
        wrong=st.sampled_from(["epoch", "attempt", "index", "group_id", "worker"]),
        by=st.sampled_from([-(1 << 40), 1 << 40]),
    )
    def answer_another_lease(self, wrong: str, by: int) -> None:
        worker, lease = self.random.choice(self.leases)
        reply = generated(lease, self.random.choice(lease.indices), self.core.version)
        if wrong == "worker":
            worker = "rollout-x"
        else:
            changed = {wrong: getattr(reply.key, wrong) + by}
            reply = Generated(msgspec.structs.replace(reply.key, **changed), reply.sample)
        before = len(self.core.state.recorded)
        assert self.core.handle(inputs.Received(worker, reply), self.now) == []
        assert len(self.core.state.recorded) == before

    @precondition(lambda self: self.leases)
    @rule(
        name=st.sampled_from(["versions", "logprobs", "ids"]),
        value=st.sampled_from([-(1 << 31), -2]),
        logprob=st.sampled_from([0.1, math.nan, math.inf, -math.inf]),
        partial=st.booleans(),
    )
    def return_an_impossible_sample(
        self, name: str, value: int, logprob: float, partial: bool
    ) -> None:
        """It is never recorded, and costs at most the lease."""
        worker, lease = self.random.choice(self.leases)
        index = self.random.choice(lease.indices)
        sample = make_sample(self.core.version)
        array = getattr(sample, name).copy()
        array[-1] = logprob if name == "logprobs" else value
        sample = msgspec.structs.replace(sample, **{name: array})
        before = len(self.core.state.recorded)
        reply: Message = Generated(lease.key(index), sample)
        if partial:
            tokens = Partial(sample.ids, sample.logprobs, sample.versions)
            reply = PartialSample(lease.key(index), tokens)
        actions = self.core.handle(inputs.Received(worker, reply), self.now)
        new = self.core.state.recorded[before:]
        assert not [e for e in new if isinstance(e, SampleReturned | PartialSaved)]
        self.take(actions)

    @precondition(lambda self: self.batch is None)
    @rule()
    def want_a_batch(self) -> None:
        for leader in self.random.sample(self.leaders, len(self.leaders)):
            if self.batch is None:
                request = inputs.BatchRequested(leader, self.core.version)
                self.take(self.core.handle(request, self.now))

    @precondition(lambda self: self.batch is not None)
    @rule(early=st.booleans())
    def finish_the_step(self, early: bool) -> None:
        assert self.batch is not None
        for leader in self.leaders[1:] if early else ():
            request = inputs.BatchRequested(leader, self.core.version + 1)
            self.take(self.core.handle(request, self.now))
        self.batch = None
        self.take(
            self.core.handle(
                inputs.Received("trainer-0", StepDone(self.core.version + 1, {})), self.now
            )
        )
        for name, worker in list(self.core.fleet.rollout.items()):
            if not worker.is_fenced:
                self.core.handle(inputs.UpdateStarted(name), 0)
                self.take(
                    self.core.handle(
                        inputs.ServerUpdated(name, version=self.core.version), self.now
                    )
                )

    @rule(seconds=st.sampled_from([0.5, 10.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for name in [*self.core.fleet.rollout, *self.core.fleet.reward]:
            self.core.fleet.heard(name, self.now)
        self.take(self.core.handle(inputs.Tick(), self.now))

    @invariant()
    def ledger_balances(self) -> None:
        if hasattr(self, "core"):
            self.core.state.check()
            limit = (
                self.core.version + self.core.settings.max_staleness + 1
            ) * self.core.settings.prompts_per_step
            assert self.core.state.ledger.trained + self.core.state.pending <= limit, (
                "admitted past max_staleness"
            )

    @invariant()
    def load_equals_running_samples(self) -> None:
        if hasattr(self, "core"):
            for name, worker in self.core.fleet.rollout.items():
                running = [
                    g
                    for g in self.core.state.groups.values()
                    if g.worker == name and g.state is GroupState.RUNNING
                ]
                assert worker.load == sum(len(group.missing) for group in running)
                prompts = [len(group.prompt.ids) for group in running if group.missing]
                assert worker.prompt_tokens == sum(prompts)

    @invariant()
    def idle_server_has_room(self) -> None:
        if hasattr(self, "core"):
            for worker in self.core.fleet.rollout.values():
                assert worker.load or not worker.is_full
