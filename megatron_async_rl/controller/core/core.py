"""What is generated, scored and trained, decided by a state machine without sockets, clock or threads.

Every method is one event; it returns the actions that follow. Time comes in as a number, prompts from an injected
source, so the same code runs under asyncio, under a simulation on a virtual clock, and under a search of its states.

A training group's way, and the file that tells of each stretch of it:

    QUEUED --lease--> RUNNING --all samples back and scored--> READY --cut--> IN_BATCH --step done--> trained
       |   leases.py                    verdicts.py              |   cut.py
       ^                 |                                       |
       +---- worker lost, lease late (attempt + 1) --------------+------> dropped(reason)

What must outlive a crash is in books.py, as facts; liveness, load and who was asked what are forgotten with a life.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable

from megatron_async_rl.controller.core.actions import Action, Dropped, EvalFinished, ServerLost
from megatron_async_rl.controller.core.batch_selection import BatchSelector
from megatron_async_rl.controller.core.events import (
    AnyEvent,
    BatchTrained,
    ControllerStarted,
    GroupDropped,
    JournalEvent,
    PartialSaved,
    SampleReturned,
    SampleScored,
)
from megatron_async_rl.controller.core.fleet import Fleet, RolloutWorker, ServerState, Worker
from megatron_async_rl.controller.core.groups import Group, GroupState
from megatron_async_rl.controller.core.leases import Leases
from megatron_async_rl.controller.core.ledger import DropReason, Ledger
from megatron_async_rl.controller.core.questions import Questions, refusal
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.controller.core.verdicts import Verdicts
from megatron_async_rl.protocol.messages import (
    Generated,
    GenerateFailed,
    PartialSample,
    ScoreRequest,
    ScoreResult,
)
from megatron_async_rl.protocol.types import Prompt


class Core:
    def __init__(
        self, rules: CoreSettings, next_prompt: Callable[[], Prompt], epoch: int = 1
    ) -> None:
        self.rules = rules
        self.fleet = Fleet()
        self.state = ControllerState(rules.samples_per_prompt, next_prompt, epoch)
        self.leases = Leases(rules, self.state, self.fleet)
        self.verdicts = Verdicts(rules, self.state, self.fleet)
        self.questions = Questions(rules, self.leases, self.fleet)
        self.cut = BatchSelector(rules, self.state)
        self.admitting = False  # the shell opens the gate when version 0 is served and evaluated
        self.hold_batches = False  # the trainer is busy with something else: nothing is cut
        self.num_fenced_messages = 0
        self.last_fault = ""  # of the last sample that no engine can have made
        self.num_replayed_steps = 0
        self._eval_ids: set[int] = set()
        self._eval_ended: list[Group] = []

    # ---- reading

    @property
    def epoch(self) -> int:
        """The life of the controller: its messages carry it, and replies to another are fenced."""
        return self.state.epoch

    @property
    def version(self) -> int:
        """Of the trainer's weights."""
        return self.state.version

    @property
    def ledger(self) -> Ledger:
        return self.state.ledger

    @property
    def groups(self) -> dict[int, Group]:
        return self.state.groups

    @property
    def pending(self) -> int:
        return self.state.pending

    @property
    def next_step(self) -> int:
        return self.leases.next_step

    @property
    def batch_awaited(self) -> bool:
        """All leaders wait for a batch of the newest version that is not cut yet."""
        return self.cut.wanted_since is not None

    def check(self) -> None:
        """Raises LedgerError unless every admitted group is accounted for."""
        self.state.check()

    # ---- lives of the controller

    def restore(self, facts: Iterable[AnyEvent]) -> None:
        """Rebuilds what an earlier life knew, and begins a new one: epoch + 1, no workers, every lease taken back."""
        self.state.restore(facts)
        self.state.record(ControllerStarted(self.epoch + 1))
        for group in list(self.groups.values()):
            if group.state is GroupState.READY:
                self._complete(group)  # the crash may have come before its drop was recorded
            elif group.state is not GroupState.IN_BATCH:
                if group.missing:
                    self.state.move(group, GroupState.QUEUED)
                    group.worker = ""
                self.verdicts.owe_unjudged(group)
        self.check()

    def take_events(self) -> list[JournalEvent]:
        """What was recorded since the last call: for the journal, before the actions that go with it."""
        return self.state.take_events()

    # ---- events: workers

    def rollout_joined(self, name: str, capacity: int, now: float) -> list[Action]:
        """A worker of a known name is a new life of it: what the old one had is taken back."""
        actions = self.worker_lost(name, now)
        self.fleet.rollout[name] = RolloutWorker(name, capacity, now)
        return actions

    def reward_joined(self, name: str, capacity: int, now: float) -> list[Action]:
        actions = self.worker_lost(name, now)
        self.fleet.reward[name] = Worker(name, capacity, now)
        return actions + self._advance(now)

    def updating(self, name: str) -> None:
        self.fleet.rollout[name].state = ServerState.UPDATING

    def serving(self, name: str, version: int, now: float) -> list[Action]:
        worker = self.fleet.rollout[name]
        worker.state, worker.version = ServerState.SERVING, version
        return self._advance(now)

    def fenced(self, name: str, reason: str, now: float) -> list[Action]:
        """The server may not be trusted with its weights: it keeps no work and gets none."""
        worker = self.fleet.rollout[name]
        worker.state, worker.reason = ServerState.FENCED, reason
        return self._take_back(name) + self._advance(now)

    def worker_lost(self, name: str, now: float) -> list[Action]:
        if self.fleet.rollout.pop(name, None):
            return [ServerLost(name), *self._take_back(name), *self._advance(now)]
        self.fleet.reward.pop(name, None)
        self.verdicts.take_back(name)
        self.questions.take_back(name)
        return self._advance(now)

    # ---- events: samples

    def generated(self, worker: str, reply: Generated, now: float) -> list[Action]:
        group = self.leases.group_of(worker, reply)
        if group is None:
            self.num_fenced_messages += 1
            return []
        if fault := self.leases.fault(group, reply.sample):
            self.num_fenced_messages += 1
            self.last_fault = f"{worker}: sample {reply.key} is refused: {fault}"
            return self._release(group) + self._advance(
                now
            )  # like a failure: another server may do better
        self.state.record(SampleReturned(group.group_id, reply.key.index, reply.sample))
        self.leases.unload(worker)
        self.verdicts.owe(group, reply.key.index)
        return self._advance(now)

    def interrupted(self, worker: str, reply: PartialSample) -> list[Action]:
        """What a running sample has so far: kept for whoever goes on with it, should its worker be lost."""
        group = self.leases.group_of(worker, reply)
        if group is None:
            self.num_fenced_messages += 1
        else:
            self.state.record(PartialSaved(group.group_id, reply.key.index, reply.partial))
        return []

    def generate_failed(self, worker: str, reply: GenerateFailed, now: float) -> list[Action]:
        group = self.leases.group_of(worker, reply)
        if group is None:
            self.num_fenced_messages += 1
            return []
        return self._release(group) + self._advance(now)

    def asked(self, worker: str, ask: ScoreRequest, now: float) -> list[Action]:
        """A workflow wants something judged before its sample is whole."""
        if self.leases.group_of(worker, ask) is None:
            self.num_fenced_messages += 1
            return [refusal(worker, ask, "the lease has ended")]
        self.questions.put(worker, ask)
        return self._advance(now)

    def scored(self, worker: str, reply: ScoreResult, now: float) -> list[Action]:
        if reply.call:
            answer = self.questions.answered(worker, reply)
            self.num_fenced_messages += answer is None
            return (answer or []) + self._advance(now)
        if not self.verdicts.is_asked_of(worker, reply):
            self.num_fenced_messages += 1
            return []
        self.verdicts.settle((reply.key.group_id, reply.key.index))
        group = self.groups.get(reply.key.group_id)
        actions: list[Action] = []
        if group is not None and reply.reward is not None and math.isfinite(reply.reward):
            self.state.record(SampleScored(group.group_id, reply.key.index, reply.reward))
            if group.is_judged:
                actions += self._complete(group)
        elif group is not None:
            actions += self._no_verdict(group, reply.key.index)
        return actions + self._advance(now)

    # ---- events: trainer

    def trainer_joined(self, leader: int) -> None:
        self.cut.leader_joined(leader)
        self.hold_batches = False

    def batch_wanted(self, leader: int, version: int, now: float) -> list[Action]:
        """A data-parallel leader is ready to train on `version`; one below ours was trained before."""
        if version > self.version:
            self.num_fenced_messages += 1
            return []
        known = self.cut.wanted(leader, version, now)
        return [known] if known else self._advance(now)

    def step_done(self, version: int, now: float) -> list[Action]:
        """The batch of version - 1 is in the weights: its groups count as trained."""
        if version <= self.version:
            self.num_replayed_steps += 1  # they count already
            return []
        if version != self.version + 1 or not self.state.in_batch:
            self.num_fenced_messages += 1
            return []
        self.state.record(BatchTrained(version))
        self.check()
        return self._advance(now)

    # ---- events: the rest

    def start_eval(self, prompts: list[Prompt], now: float) -> list[Action]:
        """Generates and scores one sample of each; training groups are not leased meanwhile."""
        self._eval_ids |= {self.state.open_eval(prompt).group_id for prompt in prompts}
        return self._advance(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed: who was silent is lost, what is overdue goes to others."""
        actions: list[Action] = []
        for name in self.fleet.silent_since(now - self.rules.heartbeat_timeout_s):
            actions += self.worker_lost(name, now)
        for group in self.leases.overdue(now):
            actions += self._release(group)
        for key in self.verdicts.overdue(now):
            self.verdicts.settle(key)
            if group := self.groups.get(key[0]):
                actions += self._no_verdict(group, key[1])
        actions += self.questions.tick(now)
        return actions + self._advance(now)

    def end(self) -> list[Action]:
        """The last step is done: closes the books over what is still pending."""
        self.admitting = False
        actions: list[Action] = []
        for group in [g for g in self.groups.values() if g.purpose == "train"]:
            actions += self._drop(group, DropReason.RUN_ENDED)
        self.check()
        return actions

    # ---- inside

    def _advance(self, now: float) -> list[Action]:
        """Everything that has become possible: scoring, the cut, leases, admissions."""
        actions: list[Action] = [
            *self.questions.pass_on(now),
            *self.verdicts.ask(now),
        ]  # a question holds up a sample
        if self.batch_awaited and not self.hold_batches:
            for group in self.cut.stale():
                actions += self._drop(group, DropReason.STALE)
            batch = self.cut.batch(now)
            actions += [batch] if batch else []
        actions += self.leases.lease_queued(now, only_eval=bool(self._eval_ids))
        if self.admitting and not self._eval_ids:
            actions += self.leases.admit(now)
        return actions

    def _take_back(self, worker: str) -> list[Action]:
        return [action for group in self.leases.held_by(worker) for action in self._release(group)]

    def _release(self, group: Group) -> list[Action]:
        reason = self.leases.release(group)
        return self._drop(group, reason) if reason else []

    def _no_verdict(self, group: Group, index: int) -> list[Action]:
        if self.verdicts.try_again(group, index):
            return []
        return self._drop(group, DropReason.REWARD_UNAVAILABLE)

    def _complete(self, group: Group) -> list[Action]:
        """All samples are back and judged. A group that has nothing to teach is not kept."""
        if group.purpose == "eval":
            return self._end_eval(group)
        if self.rules.drop_equal_rewards and len(set(group.rewards)) == 1:
            return self._drop(group, DropReason.EQUAL_REWARDS)
        low, high = self.rules.success_rates
        if not low <= statistics.fmean(r for r in group.rewards if r is not None) <= high:
            return self._drop(group, DropReason.SUCCESS_RATE)
        return []

    def _drop(self, group: Group, reason: DropReason) -> list[Action]:
        if group.state is GroupState.RUNNING:
            self.leases.unload(group.worker, len(group.missing))  # what still comes of it is fenced
        self.state.record(GroupDropped(group.group_id, reason.value))
        if group.purpose == "eval":
            return self._end_eval(group)
        return [Dropped(group, reason)]

    def _end_eval(self, group: Group) -> list[Action]:
        if group.group_id in self.groups:
            self.state.forget(group)
        self._eval_ids.discard(group.group_id)
        self._eval_ended.append(group)
        if self._eval_ids:
            return []
        ended, self._eval_ended = self._eval_ended, []
        return [EvalFinished(self.version, ended)]
