"""A simulated run on a virtual clock: the real core, with simulated servers, scoring and trainer.

Messages are delayed, lost and duplicated, and processes crash, at random instants drawn from one
seed; the same seed repeats the same run. The simulation keeps its own record of tokens and weights
and never asks the core for it:

    a server records the version that sampled each token;
    the trainer's weights record their batches, and a checkpoint keeps that record.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_async_rl.config.algorithm import FilterConfig
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import Action, ResendBatch, Send, SendBatch
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.fleet import ServerState
from megatron_async_rl.controller.core.groups import Group, GroupState
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.controller.filters import filter_rules
from megatron_async_rl.controller.journal.events import (
    BatchSelected,
    BatchTrained,
    GroupAdmitted,
    GroupDropped,
    JournalEvent,
    SampleReturned,
)
from megatron_async_rl.protocol.messages import (
    Generate,
    Generated,
    GenerateFailed,
    Heartbeat,
    PartialSample,
    ScoreRequest,
    ScoreResult,
    StepDone,
)
from megatron_async_rl.protocol.types import NOT_GENERATED, Partial, Prompt, Sample

RUNNING = GroupState.RUNNING
LEASE_S = 15.0
MAX_EVENTS = 20_000


class GuaranteeViolation(AssertionError):
    """A guarantee of the core does not hold; the message says which."""


def expect(holds: bool, violation: str) -> None:
    if not holds:
        raise GuaranteeViolation(violation)


def arrays(versions: list[int], num_prompt: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    all_versions = np.asarray([NOT_GENERATED] * num_prompt + versions, np.int32)
    return (
        np.arange(len(all_versions), dtype=np.int32),
        np.zeros(len(all_versions), np.float32),
        all_versions,
    )


@dataclass
class Server:
    name: str
    speed: float
    version: int
    incarnation: int
    alive: bool = True
    # (group, index) -> versions of its tokens
    tasks: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    leases: dict[tuple[int, int], Generate] = field(default_factory=dict)


@dataclass
class Result:
    events: int
    faults: int
    crashes: int
    admitted: int
    trained: int
    dropped: int
    max_staleness: int


class SimulatedRun:
    def __init__(self, seed: int, restore: Callable | None = None) -> None:
        r = self.random = random.Random(seed)
        self.settings = CoreSettings(
            prompts_per_step=r.choice([1, 2, 3]), samples_per_prompt=r.choice([1, 2]),
            max_staleness=r.choice([0, 1, 2, 4]), wait_for_stragglers=r.random() < 0.5,
            straggler_timeout_s=20.0, max_new_tokens=8, temperature=1.0,
            lease_timeout_s=LEASE_S, max_attempts=r.choice([3, 6]),
            max_scoring_attempts=3,
            heartbeat_timeout_s=15.0, steps=r.choice([4, 6, 9, 20]),
            data_parallel_size=r.choice([1, 2]),
        )  # fmt: skip
        equal_rewards = filter_rules(FilterConfig(drop_equal_rewards=True))
        if self.settings.samples_per_prompt > 1 and r.random() < 0.5:
            self.settings = replace(self.settings, filter_rules=equal_rewards)
        self.kv_random = random.Random(-seed)  # apart, so that a seed's other draws stay the same
        self.settings = replace(self.settings, kv_lease_limit=self.kv_random.choice([None, 0.9]))
        self.restore_events = restore or (lambda events: events)
        self.fault_rate = r.choice([0.0, 0.02, 0.05, 0.1])
        self.now, self.num_events, self.num_faults, self.num_crashes = 0.0, 0, 0, 0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.journal: list[JournalEvent] = []  # on disk
        self.buffer: list[JournalEvent] = []  # not yet written
        self.batches: dict[int, list[int]] = {}  # version -> groups first sent to a trainer
        self.weights: list[list[int]] = []  # batches that the trainer's weights contain
        self.saved: list[list[int]] = []  # batches that the last checkpoint contains
        self.trainer_incarnation, self.step_of, self.told_done = 0, -1, 0
        self.max_staleness = 0
        self.since: dict[tuple[int, int, int], float] = {}  # lease -> when it was first seen
        self.core = self.new_core()
        self.core.restore([])
        self.core.admitting = True
        self.servers = {
            f"rollout-{i}": Server(f"rollout-{i}", r.choice([0.3, 1, 1, 3]), 0, 0)
            for i in range(r.choice([1, 2, 3]))
        }
        for server in self.servers.values():
            self.act(self.core.handle(inputs.RolloutJoined(server.name, 6), self.now))
            self.act(self.core.handle(inputs.ServerUpdated(server.name, version=0), self.now))
        self.act(self.core.handle(inputs.RewardJoined("reward-0", 8), self.now))
        self.at(0.1, self.want_batch)
        self.at(1.0, self.tick)

    def new_core(self) -> Core:
        numbers = itertools.count()
        return Core(
            self.settings,
            lambda: Prompt(str(next(numbers)), np.arange(2, dtype=np.int32), {}),
            epoch=0,
        )

    # ---- the clock and the network

    def at(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + delay, next(self.order), event))

    def has_fault(self, weight: float = 1.0) -> bool:
        if self.random.random() < self.fault_rate * weight:
            self.num_faults += 1
            return True
        return False

    def transmit(self, deliver: Callable[[], None]) -> None:
        """Delivers a message late, and so possibly reordered; may lose or duplicate it."""
        if self.has_fault(0.5):
            return
        for _ in range(1 + self.has_fault(0.5)):
            self.at(self.random.expovariate(5.0), deliver)

    def run(self) -> Result:
        while self.queue and not self.finished:
            self.now, _, event = heapq.heappop(self.queue)
            event()
            self.num_events += 1
            expect(
                self.num_events < MAX_EVENTS,
                f"no progress: version {self.core.version} after {self.now:.0f} s",
            )
            self.core.state.check()
            limit = (
                self.core.version + self.settings.max_staleness + 1
            ) * self.settings.prompts_per_step
            expect(
                self.core.state.ledger.trained + self.core.state.pending <= limit,
                "admitted past max_staleness",
            )
        self.act(self.core.handle(inputs.RunEnded(), 0))
        return self.check_end()

    @property
    def finished(self) -> bool:
        return self.core.version == self.settings.steps and len(self.weights) == self.settings.steps

    def check_end(self) -> Result:
        self.journal += self.buffer
        events = self.journal
        admitted = [f.group_id for f in events if isinstance(f, GroupAdmitted)]
        trained = [group for batch in self.weights for group in batch]
        dropped = [f.group_id for f in events if isinstance(f, GroupDropped)]
        expect(len(set(admitted)) == len(admitted), "a group was admitted twice")
        expect(len(set(trained)) == len(trained), "a group is in the weights twice")
        expect(
            len(trained) == self.settings.steps * self.settings.prompts_per_step,
            "a batch is missing from the weights",
        )
        expect(
            sorted(trained + dropped) == sorted(admitted),
            "admitted != trained + dropped at the end",
        )
        expect(
            self.core.state.ledger.trained == len(trained),
            "the ledger's count of trained groups is wrong",
        )
        prompts = [f.prompt_id for f in events if isinstance(f, GroupAdmitted)]
        expect(prompts == [str(n) for n in range(len(prompts))], "prompts were skipped or repeated")
        versions = [f.version for f in events if isinstance(f, BatchTrained)]
        expect(
            versions == list(range(1, self.settings.steps + 1)), "versions were skipped or repeated"
        )
        returned = [(f.group_id, f.index) for f in events if isinstance(f, SampleReturned)]
        expect(len(set(returned)) == len(returned), "a sample was taken twice")
        return Result(
            self.num_events,
            self.num_faults,
            self.num_crashes,
            len(admitted),
            len(trained),
            len(dropped),
            self.max_staleness,
        )

    # ---- the controller's shell

    def act(self, actions: list[Action]) -> None:
        self.buffer += self.core.state.take_events()
        for action in actions:
            if isinstance(action, SendBatch):
                self.flush()
                self.send_batch(action.version, action.groups)
            elif isinstance(action, ResendBatch):
                batch = next(
                    (
                        f
                        for f in self.journal
                        if isinstance(f, BatchSelected) and f.version == action.version
                    ),
                    None,
                )
                expect(
                    batch is not None,
                    f"the batch of version {action.version} is not in the journal",
                )
                self.send_batch(action.version, None, batch.group_ids)
            elif isinstance(action, Send) and isinstance(action.message, Generate):
                self.transmit(lambda a=action: self.lease(a.worker, a.message))
            elif isinstance(action, Send) and isinstance(action.message, ScoreRequest):
                self.transmit(lambda a=action: self.score(a.worker, a.message))

    def flush(self) -> None:
        self.journal += self.buffer
        self.buffer = []

    def send_batch(
        self, version: int, groups: list[Group] | None, ids: list[int] | None = None
    ) -> None:
        ids = ids or [group.group_id for group in groups]
        if version in self.batches:
            expect(
                ids == self.batches[version],
                f"version {version} was trained on one batch and then sent another",
            )
        self.batches[version] = ids
        for group in groups or []:
            expect(
                None not in group.samples and None not in group.rewards,
                "an unfinished group was sent to train",
            )
            for sample in group.samples:
                lag = version - int(sample.versions[sample.generated].min())
                expect(
                    0 <= lag <= self.settings.max_staleness,
                    f"a token of staleness {lag} is trained, "
                    f"max_staleness = {self.settings.max_staleness}",
                )
                expect(
                    int(sample.versions.max()) <= version,
                    "a token of weights that did not exist yet",
                )
                self.max_staleness = max(self.max_staleness, lag)
        incarnation = self.trainer_incarnation
        self.at(0.05, lambda: self.train(version, ids, incarnation))

    def tick(self) -> None:
        self.at(1.0, self.tick)
        for worker in self.core.fleet.reward.values():
            self.core.fleet.heard(worker.name, self.now)
        for server in self.servers.values():
            if server.alive:
                self.act(self.core.handle(self.heartbeat(server), self.now))
        self.act(self.core.handle(inputs.Tick(), self.now))
        self.check_deadlines()
        for worker in self.core.fleet.rollout.values():
            expect(worker.load > 0 or not worker.is_full, f"{worker.name} starves")
        if self.random.random() < 0.3:
            self.flush()
        stale = [
            w
            for w in self.core.fleet.rollout.values()
            if w.state is ServerState.STALE and not w.is_fenced
        ]
        if stale and self.step_of == -1:  # the trainer waits for a batch and can send its weights
            self.publish([w.name for w in stale])
        if self.has_fault(0.3):
            self.crash_controller()
        if self.has_fault(0.3):
            self.crash_trainer()
        if self.has_fault(0.6):
            self.crash_server(self.random.choice(list(self.servers.values())))

    def heartbeat(self, server: Server) -> inputs.Received:
        """Reports a KV cache of 10 to 60 tokens, of which any part may be in use."""
        r = self.kv_random
        engine = {
            "kv_capacity_tokens": float(r.randint(10, 60)),
            "kv_use_fraction": r.choice([0.2, 0.7, 1.0]),
            "queued_requests": float(r.randint(0, 1)),
        }
        return inputs.Received(server.name, Heartbeat(engine=engine))

    def check_deadlines(self) -> None:
        """Every lease and every scoring request ends in bounded time."""
        running = {
            (id(self.core), g.group_id, g.attempt): g
            for g in self.core.state.groups.values()
            if g.state is RUNNING
        }
        self.since = {key: self.since.get(key, self.now) for key in running}
        for key, group in running.items():
            limit_s = LEASE_S * (1 if group.missing else 2 + self.settings.max_scoring_attempts) + 5
            expect(self.now - self.since[key] <= limit_s, f"group {group.group_id} has no deadline")

    def crash_controller(self) -> None:
        """Ends at any instant, with part of the unwritten events on disk; its workers continue."""
        self.num_crashes += 1
        self.journal += self.buffer[: self.random.randint(0, len(self.buffer))]
        self.buffer = []
        self.core = self.new_core()
        self.core.restore(self.restore_events(self.journal))
        self.core.admitting = True
        self.act([])
        self.act(self.core.handle(inputs.RewardJoined("reward-0", 8), self.now))
        for server in self.servers.values():
            if server.alive:
                self.act(self.core.handle(inputs.RolloutJoined(server.name, 6), self.now))
                if 0 <= server.version <= self.core.version:
                    self.act(
                        self.core.handle(
                            inputs.ServerUpdated(server.name, version=server.version), self.now
                        )
                    )
        # the trainer repeats the messages that it has no answer to
        if len(self.weights) > self.core.version:
            self.act(
                self.core.handle(
                    inputs.Received("trainer-0", StepDone(len(self.weights), {})), self.now
                )
            )
        expect(self.core.version >= len(self.weights), "the journal lost a batch that was trained")
        if self.step_of == -1:
            self.at(0.1, self.want_batch)

    # ---- the trainer

    def want_batch(self) -> None:
        if self.finished or self.step_of != -1:
            return
        for leader in range(self.settings.data_parallel_size):
            overtook = leader and self.core.batch_selector.requests.get(leader) == len(self.weights)
            for _ in range((not overtook) + self.has_fault(0.2)):
                self.act(
                    self.core.handle(inputs.BatchRequested(leader, len(self.weights)), self.now)
                )

    def train(self, version: int, ids: list[int], incarnation: int) -> None:
        if (
            incarnation != self.trainer_incarnation
            or version != len(self.weights)
            or self.step_of == version
        ):
            return  # to an earlier incarnation, or a duplicate
        self.step_of = version
        self.at(self.random.choice([1.0, 3.0]), lambda: self.end_step(version, ids, incarnation))

    def end_step(self, version: int, ids: list[int], incarnation: int) -> None:
        if incarnation != self.trainer_incarnation:
            return
        self.weights = [*self.weights, ids]
        self.step_of = -1
        # the others may ask for the next batch before the report of leader 0 arrives
        for leader in range(1, self.settings.data_parallel_size):
            if self.random.random() < 0.5:
                self.act(
                    self.core.handle(inputs.BatchRequested(leader, len(self.weights)), self.now)
                )
        self.act(
            self.core.handle(
                inputs.Received("trainer-0", StepDone(len(self.weights), {})), self.now
            )
        )
        self.flush()  # durable before any server gets the new weights
        if len(self.weights) == self.core.version:
            self.publish([w.name for w in self.core.fleet.rollout.values() if not w.is_fenced])
        if self.random.random() < 0.5:
            self.saved = self.weights
        self.want_batch()

    def crash_trainer(self) -> None:
        self.num_crashes += 1
        self.trainer_incarnation += 1
        self.weights, self.step_of = self.saved, -1
        for leader in range(self.settings.data_parallel_size):
            self.core.handle(inputs.TrainerJoined(leader), 0)
        self.at(5.0, self.want_batch)

    def publish(self, names: list[str]) -> None:
        version = len(self.weights)
        for name in names:
            server = self.servers[name]
            if not server.alive:
                continue
            self.core.handle(inputs.UpdateStarted(name), 0)
            for key, tokens in server.tasks.items():  # interrupted: the tokens go to the controller
                lease = server.leases[key]
                if tokens:
                    partial = PartialSample(lease.key(key[1]), Partial(*arrays(tokens)))
                    self.transmit(
                        lambda n=name, p=partial: self.act(
                            self.core.handle(inputs.Received(n, p), 0)
                        )
                    )
            if self.has_fault(0.5):
                self.act(
                    self.core.handle(inputs.ServerFenced(name, reason="digests differ"), self.now)
                )
                self.crash_server(server)
                continue
            server.version = version
            self.act(self.core.handle(inputs.ServerUpdated(name, version=version), self.now))

    # ---- servers and scoring

    def lease(self, name: str, lease: Generate) -> None:
        server = self.servers[name]
        if not server.alive:
            return
        partials = lease.partials or [None] * len(lease.indices)
        for index, partial in zip(lease.indices, partials, strict=True):
            key = (lease.group_id, index)
            before = [] if partial is None else partial.versions[partial.num_input :].tolist()
            server.tasks[key], server.leases[key] = before, lease
            incarnation = server.incarnation
            self.at(
                self.random.expovariate(server.speed),
                lambda k=key, e=lease, n=incarnation: self.generate(server, k, e, n),
            )

    def generate(
        self, server: Server, key: tuple[int, int], lease: Generate, incarnation: int
    ) -> None:
        """Generates one token under the server's current weights; sends the sample at its end."""
        if (
            server.incarnation != incarnation
            or not server.alive
            or server.leases.get(key) is not lease
            or key not in server.tasks
        ):
            return
        server.tasks[key] = server.tasks[key] + [server.version]
        if len(server.tasks[key]) < 8 and self.random.random() < 0.6:
            self.at(
                self.random.expovariate(server.speed),
                lambda: self.generate(server, key, lease, incarnation),
            )
            return
        sample_key = lease.key(key[1])
        ids, logprobs, versions = arrays(server.tasks.pop(key))
        sample = Sample(ids=ids, logprobs=logprobs, versions=versions, stop="stop", text="")
        if self.has_fault(0.3):
            self.transmit(
                lambda: self.act(
                    self.core.handle(
                        inputs.Received(server.name, GenerateFailed(sample_key, "x")), self.now
                    )
                )
            )
        else:
            self.transmit(
                lambda: self.act(
                    self.core.handle(
                        inputs.Received(server.name, Generated(sample_key, sample)), self.now
                    )
                )
            )

    def crash_server(self, server: Server) -> None:
        if not server.alive:
            return
        self.num_crashes += 1
        server.alive, server.version = False, -1
        server.incarnation += 1
        server.tasks, server.leases = {}, {}
        if self.random.random() < 0.5:  # noticed at once; otherwise by missing heartbeats
            self.act(self.core.handle(inputs.WorkerLost(server.name), self.now))
        self.at(self.random.choice([3.0, 25.0]), lambda: self.restart_server(server))

    def restart_server(self, server: Server) -> None:
        server.alive = True
        self.act(self.core.handle(inputs.RolloutJoined(server.name, 6), self.now))

    def score(self, name: str, request: ScoreRequest) -> None:
        reward = None if self.has_fault(0.5) else float(self.random.random() < 0.5)
        result = ScoreResult(request.key, reward)
        if self.has_fault(0.1):
            # the reward worker crashed and restarts
            self.at(2.0, lambda: self.act(self.core.handle(inputs.RewardJoined(name, 8), self.now)))
            return
        self.at(
            self.random.expovariate(3.0),
            lambda: self.act(self.core.handle(inputs.Received(name, result), self.now)),
        )


def simulate(seed: int, restore: Callable | None = None) -> Result:
    """Runs to the end. Raises GuaranteeViolation or LedgerError when a guarantee does not hold."""
    return SimulatedRun(seed, restore).run()
