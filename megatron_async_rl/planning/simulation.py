"""Simulates a run on a virtual clock: the controller's own core, simulated servers and trainer.

The core admits, leases, selects batches and bounds staleness as in a real run; servers (server.py),
trainer and weight updates take the time that the costs give. Failures are not simulated. To be
fast, one token of the core's samples stands for `grain` tokens.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from megatron_async_rl.controller.core import actions, inputs
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.groups import DropReason, Group
from megatron_async_rl.controller.core.kv_cache import QUEUE_USE
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.errors import Error
from megatron_async_rl.planning.costs import Costs
from megatron_async_rl.planning.lengths import Lengths
from megatron_async_rl.planning.server import Request, Server
from megatron_async_rl.planning.steps import Step, StepMeter
from megatron_async_rl.protocol import messages
from megatron_async_rl.protocol.types import NOT_GENERATED, Prompt, Sample

UNITS_PER_SAMPLE = 128  # tokens of the core's samples, on average
TICK_S = 1.0  # as the controller's
NO_LIMIT = 1e18


@dataclass(frozen=True)
class Workload:
    """The load of a simulated run, and the servers that generate it."""

    settings: CoreSettings
    lengths: Lengths
    servers: int
    concurrent: int  # samples in flight on each server
    max_running: int  # in the engine
    interrupt: str  # weights.interrupt
    keep_kv: bool
    dropped_fraction: float = 0.0  # of the groups, by filters
    seed: int = 1


class Simulation:
    def __init__(self, workload: Workload, costs: Costs) -> None:
        self.workload, self.costs = workload, costs
        self.grain = max(1.0, workload.lengths.mean_tokens / UNITS_PER_SAMPLE)
        self.now = 0.0
        self.num_samples = 0
        self._rng = np.random.default_rng(workload.seed)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order, self._numbers = itertools.count(), itertools.count()
        self._wakes: dict[str, int] = {}  # the valid wake of each server
        self._prompts: dict[int, tuple[int, np.ndarray]] = {}  # lengths, by group
        self._finished: dict[int, list[Request]] = {}  # by group
        self._pressure: dict[str, tuple[bool, bool]] = {}
        self._draining: set[str] = set()
        self._waiting_since = 0.0
        self._is_ticking = False
        self._steps: list[Step] = []
        self.core = Core(self._core_settings(), self._next_prompt)
        settings = workload.settings
        self.servers = {
            name: Server(name, costs, workload.max_running, settings.max_new_tokens)
            for name in (f"rollout-{n}" for n in range(workload.servers))
        }
        self._meter = StepMeter(list(self.servers.values()))

    def steps(self) -> Iterator[Step]:
        """Yields the training steps as they end, up to settings.steps of the workload."""
        self._handle(inputs.RewardJoined("reward-0", 1 << 30))
        for name in self.servers:
            self._handle(inputs.RolloutJoined(name, self.workload.concurrent))
            self._report(name, kv_use=0.0, queues=False)
            self._handle(inputs.ServerUpdated(name, version=0))
        self._handle(inputs.TrainerJoined(0))
        self._handle(inputs.AdmissionOpened())
        self._request_batch()
        while self.core.version < self.workload.settings.steps or self._steps:
            if self._steps:
                yield self._steps.pop()
                continue
            if not self._queue:
                raise Error(
                    f"the simulated run stopped at version {self.core.version}: nothing is left to "
                    f"happen, with {self.core.state.pending} pending groups",
                    "report this with the configuration",
                )
            self.now, _, happen = heapq.heappop(self._queue)
            happen()

    # ---- the core

    def _core_settings(self) -> CoreSettings:
        """Returns the workload's settings in the core's coarse tokens, without deadlines."""
        settings = self.workload.settings
        return replace(
            settings,
            max_new_tokens=math.ceil(settings.max_new_tokens / self.grain),
            context_tokens=1 << 24,
            lease_timeout_s=NO_LIMIT,
            heartbeat_timeout_s=NO_LIMIT,
            data_parallel_size=1,
            single_turn=False,
            routing=None,
            filter_rules=((DropReason.FILTERED, lambda rewards, lengths, row: row["is_kept"]),),
        )

    def _next_prompt(self) -> Prompt:
        number = next(self._numbers)  # that of the group
        lengths, count = self.workload.lengths, self.workload.settings.samples_per_prompt
        drawn = self._rng.integers(len(lengths.response_tokens), size=count)
        prompt_tokens = int(lengths.prompt_tokens[drawn[0]])
        self._prompts[number] = prompt_tokens, lengths.response_tokens[drawn]
        is_kept = self._rng.random() >= self.workload.dropped_fraction
        return Prompt(str(number), _zeros(self._units(prompt_tokens)), {"is_kept": is_kept})

    def _units(self, tokens: float) -> int:
        return max(1, round(tokens / self.grain))

    def _handle(self, event: inputs.CoreEvent) -> None:
        followed = self.core.handle(event, self.now)
        self.core.state.take_events()  # there is no journal
        for action in followed:
            self._act(action)

    def _act(self, action: actions.Action) -> None:
        if isinstance(action, actions.Send):
            if isinstance(action.message, messages.Generate):
                self._start(action.worker, action.message)
            elif isinstance(action.message, messages.ScoreRequest):
                score = inputs.Received(
                    action.worker, messages.ScoreResult(action.message.key, 1.0)
                )
                self._at(self.costs.score_s, lambda: self._handle(score))
        elif isinstance(action, actions.SendBatch):
            self._train(action.groups)
        elif isinstance(action, actions.ReportDrop):
            self._forget(action.group)
        elif isinstance(action, actions.ReportError):
            raise Error(f"the core refused a simulated event: {action.error}", "report this")

    def _at(self, delay_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay_s, next(self._order), happen))

    # ---- generation

    def _start(self, name: str, lease: messages.Generate) -> None:
        prompt_tokens, response_tokens = self._prompts[lease.group_id]
        server = self.servers[name]
        requests = [
            # the samples of a group share the prefix cache: the first computes the prompt
            Request(lease, index, prompt_tokens, int(response_tokens[index]),
                    prompt_tokens if index == lease.indices[0] else 1)
            for index in lease.indices
        ]  # fmt: skip
        server.add(requests, self.now)
        self._wake_later(server)

    def _wake_later(self, server: Server) -> None:
        delay_s = server.next_change_s()
        wake = self._wakes[server.name] = next(self._order)
        if delay_s is not None:
            self._at(delay_s, lambda: self._wake(server, wake))

    def _wake(self, server: Server, wake: int) -> None:
        if self._wakes[server.name] != wake:
            return  # something came before
        for request in server.take_finished(self.now):
            self.num_samples += 1
            if request.lease.group_id in self._prompts:  # not dropped meanwhile
                self._finished.setdefault(request.lease.group_id, []).append(request)
            reply = messages.Generated(request.lease.key(request.index), self._sample(request))
            self._handle(inputs.Received(server.name, reply))
        queues = server.num_waiting > 0 and server.kv_use > QUEUE_USE
        self._report(server.name, server.kv_use, queues)
        if server.name in self._draining and server.is_empty:
            self._interrupt(server)
        self._wake_later(server)

    def _sample(self, request: Request) -> Sample:
        runs = [(version, self._units(tokens)) for version, tokens in request.versions]
        num_prompt = self._units(request.prompt_tokens)
        versions = np.repeat(
            np.array([NOT_GENERATED, *(version for version, _ in runs)], np.int32),
            [num_prompt, *(units for _, units in runs)],
        )
        zeros = _zeros(len(versions))
        return Sample(zeros, zeros.view(np.float32), versions, "stop", "")

    def _report(self, name: str, kv_use: float, queues: bool) -> None:
        """Sends the server's figures as a heartbeat if they change a decision."""
        limit = self.workload.settings.kv_lease_limit
        pressure = limit is not None and kv_use > limit, queues
        if self._pressure.get(name) == pressure:
            return
        self._pressure[name] = pressure
        engine = {
            "kv_capacity_tokens": self.costs.kv_tokens / self.grain,
            "kv_use_fraction": kv_use,
            "queued_requests": float(queues),
        }
        self._handle(inputs.Received(name, messages.Heartbeat(engine=engine)))

    # ---- training and weight updates

    def _request_batch(self) -> None:
        self._waiting_since = self.now
        self._handle(inputs.BatchRequested(0, self.core.version))
        if self.core.batch_awaited and not self._is_ticking:
            self._is_ticking = True
            self._at(TICK_S, self._tick)

    def _tick(self) -> None:
        """Lets time pass for the core while it may decide to wait no longer for stragglers."""
        self._is_ticking = self.core.batch_awaited
        if self._is_ticking:
            self._handle(inputs.Tick())
            self._at(TICK_S, self._tick)

    def _train(self, groups: list[Group]) -> None:
        requests = [request for group in groups for request in self._finished[group.group_id]]
        version, wait_s = self.core.version, self.now - self._waiting_since
        lengths = [request.prompt_tokens + request.response_tokens for request in requests]
        train_s = self.costs.train.seconds(lengths)
        for group in groups:
            self._forget(group)

        def trained_step() -> None:
            self._handle(inputs.Received("trainer", messages.StepDone(version + 1, {})))
            self._steps.append(self._meter.end_step(self.now, requests, version, wait_s, train_s))
            self._at(self.costs.between_steps_s, self._update)

        self._at(sum(train_s), trained_step)

    def _update(self) -> None:
        """Begins a weight update of all servers; with `finish` each one ends its samples first."""
        self._draining = set(self.servers)
        for server in self.servers.values():
            self._handle(inputs.UpdateStarted(server.name))
        for server in self.servers.values():
            if self.workload.interrupt != "finish" or server.is_empty:
                self._interrupt(server)

    def _interrupt(self, server: Server) -> None:
        server.interrupt(self.now, self.workload.keep_kv)
        self._wake_later(server)
        self._draining.discard(server.name)
        if not self._draining:
            self._at(self.costs.update_s, self._updated)

    def _updated(self) -> None:
        for server in self.servers.values():
            server.resume(self.core.version, self.now)
            self._wake_later(server)
        for server in self.servers.values():
            self._handle(inputs.ServerUpdated(server.name, version=self.core.version))
        self._request_batch()

    def _forget(self, group: Group) -> None:
        self._finished.pop(group.group_id, None)
        del self._prompts[group.group_id]


_ZEROS = np.zeros(1 << 20, np.int32)


def _zeros(count: int) -> np.ndarray:
    """Returns a view of shared zeros: the core counts token ids and never reads their values."""
    return _ZEROS[:count]
