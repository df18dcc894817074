"""What is generated, scored and trained, decided by a state machine without sockets, clock or threads.

Every method is one event; it returns the actions that follow. Time comes in as a number, prompts from an injected
source, so the same code runs under asyncio, under a simulation on a virtual clock, and under a search of its states.

A training group's way:

    QUEUED --lease--> RUNNING --all samples back and scored--> READY --cut--> IN_BATCH --step done--> trained
       ^                 |                                       |
       +---- worker lost, lease late (attempt + 1) --------------+------> dropped(reason)

Admission (AReaL eq. 3). With B = prompts_per_step and N groups admitted and not dropped, a new one may start on a
server of version v iff  N < (v + eta + 1) * B:  it will be trained at step N // B at the latest if order is kept. The
server's version counts, not the trainer's, which is one ahead while an update is under way. That alone does not bound
the staleness of stragglers; the cut does: it takes the oldest groups first and drops what is older than eta. With
`straggler: wait` the cut first waits, bounded, for groups that this step's version would make stale. No more than B
such groups can exist (those started at version <= v - eta number at most (v + 1) * B, of which v * B are trained), so
waiting always suffices and drops nothing.

What must outlive a crash is changed in one place, `_apply`, one fact at a time (facts.py). An event records its facts;
the shell writes them to the journal before it acts, and a later life's `restore` applies them again.

A trainer that comes back from a checkpoint asks for versions that were trained before: it gets the recorded batches
again (CutBatch or Replay), changes nothing in the books, and ends up where it was. So a crash un-trains nothing.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from megatron_async_rl.controller.facts import (
    Admitted,
    AnyFact,
    Batched,
    Began,
    Closed,
    Fact,
    Judged,
    Kept,
    Leased,
    LeaseFailed,
    Returned,
    Trained,
)
from megatron_async_rl.controller.fleet import Fleet, RolloutWorker, ServerState, Worker
from megatron_async_rl.controller.ledger import DropReason, Ledger
from megatron_async_rl.errors import DataError
from megatron_async_rl.messages import Generate, Generated, GenerateFailed, Message, PartialSample, Score, Scored
from megatron_async_rl.types import Partial, Prompt, Purpose, Sample


class GroupState(enum.Enum):
    QUEUED = "queued"
    RUNNING = "running"
    READY = "ready"
    IN_BATCH = "in batch"


@dataclass
class Group:
    """The samples of one prompt, and where they stand."""

    group_id: int
    prompt: Prompt
    purpose: Purpose
    samples: list[Sample | None]
    rewards: list[float | None]
    state: GroupState = GroupState.QUEUED
    attempt: int = 0  # leases so far: what is returned under an earlier one is fenced
    failed_on: list[str] = field(default_factory=list)  # workers of the leases that came to nothing
    partials: dict[int, Partial] = field(default_factory=dict)  # of missing samples
    worker: str = ""
    deadline: float = 0.0
    floor_version: int = 0  # no token of the running samples is older
    oldest_returned: int | None = None  # of the samples that are back; kept, as looking it up reads every token
    verdict_attempts: dict[int, int] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        return [index for index, sample in enumerate(self.samples) if sample is None]

    @property
    def oldest_version(self) -> int:
        """The oldest version any token has or, while samples are out, may turn out to have."""
        if self.oldest_returned is None or (self.missing and self.floor_version < self.oldest_returned):
            return self.floor_version
        return self.oldest_returned


@dataclass(frozen=True)
class Verdict:
    """One that is under way: who was asked, for which attempt at the group, and until when."""

    judge: str
    attempt: int
    deadline: float


# ---- actions


@dataclass(frozen=True)
class Send:
    """Send this message to the worker of that name."""

    worker: str
    message: Message


@dataclass(frozen=True)
class CutBatch:
    """Train these groups on `version`: all complete, none older than eta."""

    version: int
    groups: list[Group]


@dataclass(frozen=True)
class Replay:
    """Send the recorded batch of `version` again: the trainer has come back from a checkpoint."""

    version: int


@dataclass(frozen=True)
class Dropped:
    group: Group
    reason: DropReason


@dataclass(frozen=True)
class EvalFinished:
    """All evaluation groups have ended; those dropped have no reward."""

    version: int
    groups: list[Group]


Action = Send | CutBatch | Replay | Dropped | EvalFinished


@dataclass(frozen=True)
class Rules:
    """The settings that the core goes by (config.py says what each means)."""

    prompts_per_step: int
    samples_per_prompt: int
    eta: int
    wait_for_stragglers: bool
    straggler_wait_s: float
    max_new_tokens: int
    temperature: float
    eval_temperature: float
    lease_timeout_s: float
    max_attempts: int
    max_verdict_attempts: int
    drop_equal_rewards: bool
    silence_limit_s: float
    steps: int
    data_parallel_size: int
    success_rates: tuple[float, float] = (-math.inf, math.inf)  # groups of a lower or higher mean reward are dropped


class Core:
    def __init__(self, rules: Rules, next_prompt: Callable[[], Prompt], epoch: int = 1) -> None:
        self.rules = rules
        self.epoch = epoch
        self.version = 0  # of the trainer's weights
        self.fleet = Fleet()
        self.ledger = Ledger()
        self.groups: dict[int, Group] = {}
        self.num_fenced_messages = 0
        self.admitting = False  # the shell opens the gate when version 0 is served and evaluated
        self._next_prompt = next_prompt
        self._next_group_id = 0
        self._to_score: deque[tuple[int, int]] = deque()  # (group_id, index)
        self._scoring: dict[tuple[int, int], Verdict] = {}  # those under way
        self.facts: list[Fact] = []  # recorded and not yet taken to the journal
        self.num_replayed_steps = 0
        self._leaders_want: dict[int, int] = {}  # data-parallel leader -> version it waits to train on
        self._wanted_since: float | None = None  # all leaders wait for the batch of self.version
        self.hold_batches = False  # the trainer is busy with something else: nothing is cut
        self._in_batch: list[Group] = []
        self._eval_ids: set[int] = set()
        self._eval_ended: list[Group] = []

    # ---- facts

    def restore(self, facts: Iterable[AnyFact]) -> None:
        """Rebuilds what an earlier life knew, and begins a new one: epoch + 1, no workers, every lease taken back."""
        for fact in facts:
            self._apply(fact)
        self._record(Began(self.epoch + 1))
        for group in list(self.groups.values()):
            if group.state is GroupState.READY:
                self._complete(group)  # the crash may have come before its drop was recorded
            elif group.state is not GroupState.IN_BATCH:
                self._await_or_queue(group)
        self.check()

    def take_facts(self) -> list[Fact]:
        """What was recorded since the last call: for the journal, before the actions that go with it."""
        facts, self.facts = self.facts, []
        return facts

    def _record(self, fact: Fact) -> None:
        """Makes a change that must survive. Evaluations are not kept: they are made again."""
        group = self.groups.get(getattr(fact, "group_id", -1))
        if group is None or group.purpose == "train":
            self.facts.append(fact)
        self._apply(fact)

    def _apply(self, fact: Fact) -> None:
        if isinstance(fact, Began):
            self.epoch = fact.epoch
        elif isinstance(fact, Admitted):
            self._apply_admitted(fact)
        elif isinstance(fact, Batched):
            self._in_batch = [self.groups[group_id] for group_id in fact.group_ids]
            for group in self._in_batch:
                group.state = GroupState.IN_BATCH
        elif isinstance(fact, Trained):
            for group in self._in_batch:
                del self.groups[group.group_id]
                self.ledger.trained += 1
            self._in_batch, self.version = [], fact.version
        elif isinstance(fact, Closed):
            group = self.groups.pop(fact.group_id)
            if group.purpose == "train":
                self.ledger.dropped[DropReason(fact.reason)] += 1
        elif isinstance(fact, Leased | LeaseFailed | Kept | Returned | Judged):
            self._apply_to_group(self.groups[fact.group_id], fact)

    def _apply_admitted(self, fact: Admitted) -> None:
        prompt = self._next_prompt()
        if prompt.prompt_id != fact.prompt_id:
            raise DataError(
                f"the journal admitted prompt {fact.prompt_id!r} where data.train now gives {prompt.prompt_id!r}: the dataset "
                "or run.seed changed since the run began; put them back, or begin anew with --from-scratch"
            )
        self._add_group(fact.group_id, prompt, "train", self.rules.samples_per_prompt)
        self.ledger.admitted += 1

    def _apply_to_group(self, group: Group, fact: Leased | LeaseFailed | Kept | Returned | Judged) -> None:
        if isinstance(fact, Leased):
            group.state, group.worker = GroupState.RUNNING, fact.worker
            group.attempt, group.floor_version = fact.attempt, fact.floor_version
        elif isinstance(fact, LeaseFailed):
            group.failed_on.append(fact.worker)
            group.state, group.worker = GroupState.QUEUED, ""
        elif isinstance(fact, Kept):
            group.partials[fact.index] = fact.partial
        elif isinstance(fact, Returned):
            group.samples[fact.index] = fact.sample
            oldest = fact.sample.oldest_version
            group.oldest_returned = min(oldest, oldest if group.oldest_returned is None else group.oldest_returned)
            group.partials.pop(fact.index, None)
        else:
            group.rewards[fact.index] = fact.reward
            if all(reward is not None for reward in group.rewards):
                group.state = GroupState.READY

    def _await_or_queue(self, group: Group) -> None:
        """A group of an earlier life: its missing samples need a new lease, those without a verdict a judge."""
        if group.missing:
            group.state, group.worker = GroupState.QUEUED, ""
        self._to_score.extend(
            (group.group_id, index)
            for index, sample in enumerate(group.samples)
            if sample is not None and group.rewards[index] is None
        )

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
        return self._take_back(name, now)

    def worker_lost(self, name: str, now: float) -> list[Action]:
        if self.fleet.rollout.pop(name, None):
            return self._take_back(name, now)
        self.fleet.reward.pop(name, None)
        for key in [key for key, verdict in self._scoring.items() if verdict.judge == name]:
            del self._scoring[key]
            self._to_score.append(key)
        return self._advance(now)

    # ---- events: samples

    def generated(self, worker: str, message: Generated, now: float) -> list[Action]:
        group = self._leased_to(worker, message)
        if group is None:
            self.num_fenced_messages += 1
            return []
        if not self._is_whole(group, message.sample):
            self.num_fenced_messages += 1  # versions no server can have had: refused like a failure
            return self._release(group) + self._advance(now)
        self._record(Returned(group.group_id, message.index, message.sample))
        self._unload(worker)
        self._to_score.append((group.group_id, message.index))
        return self._advance(now)

    def interrupted(self, worker: str, message: PartialSample) -> list[Action]:
        """What a running sample has so far: kept for whoever goes on with it, should its worker be lost."""
        group = self._leased_to(worker, message)
        if group is None:
            self.num_fenced_messages += 1
        else:
            self._record(Kept(group.group_id, message.index, message.partial))
        return []

    def generate_failed(self, worker: str, message: GenerateFailed, now: float) -> list[Action]:
        group = self._leased_to(worker, message)
        if group is None:
            self.num_fenced_messages += 1
            return []
        return self._release(group) + self._advance(now)

    def scored(self, worker: str, message: Scored, now: float) -> list[Action]:
        key = (message.group_id, message.index)
        if message.epoch != self.epoch or not self._is_asked_of(worker, key, message.attempt):
            self.num_fenced_messages += 1
            return []
        del self._scoring[key]
        if judge := self.fleet.reward.get(worker):
            judge.load -= 1
        group = self.groups.get(message.group_id)
        actions: list[Action] = []
        if group is not None and message.reward is not None:
            self._record(Judged(group.group_id, message.index, message.reward))
            if all(reward is not None for reward in group.rewards):
                actions += self._complete(group)
        elif group is not None:
            actions += self._no_verdict(group, message.index)
        return actions + self._advance(now)

    # ---- events: trainer

    def trainer_joined(self, leader: int) -> None:
        """A new life of this leader: it has forgotten what it waited for."""
        self._leaders_want.pop(leader, None)
        self._wanted_since, self.hold_batches = None, False

    def batch_wanted(self, leader: int, version: int, now: float) -> list[Action]:
        """A data-parallel leader is ready to train on `version`; the batch leaves when all are.

        A version below ours was trained before: its batch is sent again, unchanged.
        """
        if version > self.version:
            self.num_fenced_messages += 1
            return []
        self._leaders_want[leader] = version
        if list(self._leaders_want.values()).count(version) < self.rules.data_parallel_size:
            return []
        if version < self.version:
            self._leaders_want.clear()
            return [Replay(version)]
        if self._in_batch:
            self._leaders_want.clear()
            return [CutBatch(version, self._in_batch)]
        if self._wanted_since is None:
            self._wanted_since = now
        return self._advance(now)

    def step_done(self, version: int, now: float) -> list[Action]:
        """The batch of version - 1 is in the weights: its groups count as trained."""
        if version <= self.version:
            self.num_replayed_steps += 1  # they count already
            return []
        if version != self.version + 1 or not self._in_batch:
            self.num_fenced_messages += 1
            return []
        self._record(Trained(version))
        self.check()
        return self._advance(now)

    @property
    def batch_awaited(self) -> bool:
        """All leaders wait for a batch of the newest version that is not cut yet."""
        return self._wanted_since is not None

    # ---- events: the rest

    def start_eval(self, prompts: list[Prompt], now: float) -> list[Action]:
        """Generates and scores one sample of each; training groups are not leased meanwhile."""
        for prompt in prompts:
            self._eval_ids.add(self._add_group(self._next_group_id, prompt, "eval", 1).group_id)
        return self._advance(now)

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for name in self.fleet.silent_since(now - self.rules.silence_limit_s):
            actions += self.worker_lost(name, now)
        for group in list(self.groups.values()):
            if group.state is GroupState.RUNNING and group.missing and now > group.deadline:
                actions += self._release(group)
        for key, verdict in [(k, v) for k, v in self._scoring.items() if now > v.deadline]:
            del self._scoring[key]
            if judge := self.fleet.reward.get(verdict.judge):
                judge.load -= 1
            if group := self.groups.get(key[0]):
                actions += self._no_verdict(group, key[1])
        return actions + self._advance(now)

    def end(self) -> list[Action]:
        """The last step is done: closes the books over what is still pending."""
        self.admitting = False
        actions: list[Action] = []
        for group in [g for g in self.groups.values() if g.purpose == "train"]:
            actions += self._drop(group, DropReason.RUN_ENDED)
        self.check()
        return actions

    # ---- reading

    @property
    def pending(self) -> int:
        return sum(group.purpose == "train" for group in self.groups.values())

    @property
    def next_step(self) -> int:
        """The step at which a group admitted now is trained at the latest, if order is kept."""
        return (self.ledger.trained + self.pending) // self.rules.prompts_per_step

    def check(self) -> None:
        """Raises ConservationError unless every admitted group is accounted for."""
        self.ledger.check(self.pending)

    # ---- inside

    def _advance(self, now: float) -> list[Action]:
        """Everything that has become possible: scoring, leases, admissions, the cut."""
        return self._dispatch_scores(now) + self._cut(now) + self._lease(now)

    def _add_group(self, group_id: int, prompt: Prompt, purpose: Purpose, num_samples: int) -> Group:
        group = Group(group_id, prompt, purpose, [None] * num_samples, [None] * num_samples)
        self._next_group_id = max(self._next_group_id, group_id + 1)
        self.groups[group_id] = group
        return group

    def _lease(self, now: float) -> list[Action]:
        actions: list[Action] = []
        queued = [g for g in self.groups.values() if g.state is GroupState.QUEUED]
        if self._eval_ids:
            queued = [g for g in queued if g.purpose == "eval"]
        for group in queued:
            server = self.fleet.free_server(len(group.missing), self.version - self.rules.eta)
            if server is not None:
                actions.append(self._lease_to(server, group, now))
        while self.admitting and not self._eval_ids and self.next_step < self.rules.steps:
            server = self.fleet.free_server(self.rules.samples_per_prompt, self.next_step - self.rules.eta)
            if server is None:
                break
            group_id, prompt = self._next_group_id, self._next_prompt()
            self.facts.append(Admitted(group_id, prompt.prompt_id))
            group = self._add_group(group_id, prompt, "train", self.rules.samples_per_prompt)
            self.ledger.admitted += 1
            actions.append(self._lease_to(server, group, now))
        return actions

    def _lease_to(self, server: RolloutWorker, group: Group, now: float) -> Send:
        oldest_allowed = self.version - self.rules.eta
        partials = {i: p for i, p in group.partials.items() if p.oldest_version >= oldest_allowed}
        floor_version = min([server.version, *(p.oldest_version for p in partials.values())])
        self._record(Leased(group.group_id, group.attempt + 1, server.name, floor_version))
        group.deadline = now + self.rules.lease_timeout_s
        server.load += len(group.missing)
        return Send(
            server.name,
            Generate(
                epoch=self.epoch,
                group_id=group.group_id,
                attempt=group.attempt,
                indices=group.missing,
                purpose=group.purpose,
                prompt=group.prompt,
                max_new_tokens=self.rules.max_new_tokens,
                temperature=self.rules.temperature if group.purpose == "train" else self.rules.eval_temperature,
                partials=[partials.get(index) for index in group.missing] if partials else [],
                floor_version=floor_version,
            ),
        )

    def _leased_to(self, worker: str, message: Generated | GenerateFailed | PartialSample) -> Group | None:
        """The group that this reply may change; None for a late, duplicate or foreign one."""
        group = self.groups.get(message.group_id)
        if group is None or message.epoch != self.epoch or group.state is not GroupState.RUNNING:
            return None
        if group.worker != worker or group.attempt != message.attempt or message.index not in group.missing:
            return None
        return group

    def _is_whole(self, group: Group, sample: Sample) -> bool:
        """Whether the engine can have sampled this: every version between the lease's floor and the trainer's."""
        versions = sample.versions[sample.generated]
        return len(versions) > 0 and group.floor_version <= versions.min() and versions.max() <= self.version

    def _unload(self, worker: str, count: int = 1) -> None:
        if server := self.fleet.rollout.get(worker):
            server.load -= count

    def _release(self, group: Group) -> list[Action]:
        """Ends a lease: the samples that are back stay, the others go to another server or the group is dropped."""
        self._unload(group.worker, len(group.missing))
        self._record(LeaseFailed(group.group_id, group.worker))
        if len(group.failed_on) < self.rules.max_attempts:
            return []
        several = len(set(group.failed_on)) > 1  # then it is the prompt rather than a server
        return self._drop(group, DropReason.POISON if several else DropReason.GENERATION_FAILED)

    def _take_back(self, worker: str, now: float) -> list[Action]:
        actions: list[Action] = []
        for group in [g for g in self.groups.values() if g.state is GroupState.RUNNING]:
            if group.worker == worker and group.missing:
                actions += self._release(group)
        return actions + self._advance(now)

    def _is_asked_of(self, judge: str, key: tuple[int, int], attempt: int) -> bool:
        verdict = self._scoring.get(key)
        return verdict is not None and (verdict.judge, verdict.attempt) == (judge, attempt)

    def _no_verdict(self, group: Group, index: int) -> list[Action]:
        attempts = group.verdict_attempts[index] = group.verdict_attempts.get(index, 0) + 1
        if attempts >= self.rules.max_verdict_attempts:
            return self._drop(group, DropReason.REWARD_UNAVAILABLE)
        self._to_score.append((group.group_id, index))
        return []

    def _dispatch_scores(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._to_score and (judge := self.fleet.free_judge()):
            key = self._to_score.popleft()
            group = self.groups.get(key[0])
            if group is None or (sample := group.samples[key[1]]) is None:
                continue  # dropped meanwhile
            judge.load += 1
            self._scoring[key] = Verdict(judge.name, group.attempt, now + self.rules.lease_timeout_s)
            message = Score(
                epoch=self.epoch,
                group_id=key[0],
                attempt=group.attempt,
                index=key[1],
                response=sample.text,
                row=group.prompt.row,
            )
            actions.append(Send(judge.name, message))
        return actions

    def _complete(self, group: Group) -> list[Action]:
        if group.purpose == "eval":
            return self._end_eval(group)
        if self.rules.drop_equal_rewards and len(set(group.rewards)) == 1:
            return self._drop(group, DropReason.EQUAL_REWARDS)
        low, high = self.rules.success_rates
        if not low <= statistics.fmean(r for r in group.rewards if r is not None) <= high:
            return self._drop(group, DropReason.SUCCESS_RATE)
        return []

    def _cut(self, now: float) -> list[Action]:
        if self._wanted_since is None or self.hold_batches:
            return []
        oldest_allowed = self.version - self.rules.eta
        actions: list[Action] = []
        ready = [g for g in self.groups.values() if g.state is GroupState.READY and g.purpose == "train"]
        for group in [g for g in ready if g.oldest_version < oldest_allowed]:
            ready.remove(group)
            actions += self._drop(group, DropReason.STALE)
        if len(ready) < self.rules.prompts_per_step or self._waits_for_straggler(now):
            return actions
        ready.sort(key=lambda g: (g.oldest_version, g.group_id))
        batch = ready[: self.rules.prompts_per_step]
        self._record(Batched(self.version, [group.group_id for group in batch]))
        self._wanted_since = None
        self._leaders_want.clear()
        return [*actions, CutBatch(self.version, self._in_batch)]

    def _waits_for_straggler(self, now: float) -> bool:
        assert self._wanted_since is not None
        if not self.rules.wait_for_stragglers or now - self._wanted_since > self.rules.straggler_wait_s:
            return False
        last_chance = self.version - self.rules.eta  # would be stale under version + 1
        unfinished = (GroupState.QUEUED, GroupState.RUNNING)
        out = (g for g in self.groups.values() if g.purpose == "train" and g.state in unfinished)
        return any(group.oldest_version <= last_chance for group in out)

    def _drop(self, group: Group, reason: DropReason) -> list[Action]:
        if group.state is GroupState.RUNNING:
            self._unload(group.worker, len(group.missing))  # what still comes of it is fenced
        self._record(Closed(group.group_id, reason.value))
        if group.purpose == "eval":
            return self._end_eval(group)
        return [Dropped(group, reason)]

    def _end_eval(self, group: Group) -> list[Action]:
        self.groups.pop(group.group_id, None)
        self._eval_ids.discard(group.group_id)
        self._eval_ended.append(group)
        if self._eval_ids:
            return []
        ended, self._eval_ended = self._eval_ended, []
        return [EvalFinished(self.version, ended)]
