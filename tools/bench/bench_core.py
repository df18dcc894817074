#!/usr/bin/env python3
"""Measures the controller's core: microseconds per event and tick, also while servers are lost.

    python tools/bench/bench_core.py --events 2000

CPU time of Core.handle only: one thread, no sockets, no journal. Each server runs 64 samples in
groups of 8 (16 where the table says 512 x 16) and reports its KV cache, which limits leases too;
samples return in random order (seeded) and are scored at once. Memory is that of an admitted group
without returned samples, prompt included, as tracemalloc counts it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_async_rl.controller.core import actions, inputs
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.groups import EvaluationTask
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.protocol import messages
from megatron_async_rl.protocol.types import NOT_GENERATED, Prompt, Sample

CAPACITY, NUM_TICKS = 64, 21
KV_CACHE = {"kv_capacity_tokens": 190.0, "kv_use_fraction": 0.5, "queued_requests": 0.0}
PROMPT = np.arange(4, dtype=np.int32)
VERSIONS = np.array([NOT_GENERATED] * 4 + [0] * 4, np.int32)
SAMPLE = Sample(np.arange(8, dtype=np.int32), np.zeros(8, np.float32), VERSIONS, "stop", "1")


class Run:
    """A core with its servers; the replies that it can expect are in `running`."""

    def __init__(
        self, num_servers: int, prompts_per_step: int, max_staleness: int, num_samples: int = 8
    ) -> None:
        numbers = itertools.count()
        settings = CoreSettings(
            prompts_per_step=prompts_per_step,
            samples_per_prompt=num_samples,
            max_staleness=max_staleness,
            wait_for_stragglers=True,
            straggler_timeout_s=1e9,
            max_new_tokens=4,
            temperature=1.0,
            lease_timeout_s=1e9,
            max_attempts=3,
            max_scoring_attempts=2,
            heartbeat_timeout_s=1e9,
            steps=10**6,
            data_parallel_size=1,
            kv_lease_limit=0.9,
        )
        self.core = Core(settings, lambda: Prompt(str(next(numbers)), PROMPT, {}))
        self.random = random.Random(0)
        self.running: list[tuple[str, messages.Generate, int]] = []
        self.times: list[float] = []
        for n in range(8):
            self.handle(inputs.RewardJoined(f"reward-{n}", 256))
        for n in range(num_servers):
            self.handle(inputs.RolloutJoined(f"rollout-{n}", CAPACITY))
            self.report(f"rollout-{n}")
            self.handle(inputs.ServerUpdated(f"rollout-{n}", version=0))
        self.handle(inputs.AdmissionOpened())
        self.times.clear()

    def handle(self, event: inputs.CoreEvent) -> None:
        began = time.thread_time()
        followed = self.core.handle(event, 0.0)
        self.times.append(time.thread_time() - began)
        self.core.state.take_events()
        for action in followed:
            if not isinstance(action, actions.Send):
                continue
            if isinstance(action.message, messages.Generate):
                lease = action.message
                self.running += [(action.worker, lease, index) for index in lease.indices]
            elif isinstance(action.message, messages.ScoreRequest):
                result = messages.ScoreResult(action.message.key, 1.0)
                self.handle(inputs.Received(action.worker, result))

    def report(self, server: str) -> None:
        self.handle(inputs.Received(server, messages.Heartbeat(engine=KV_CACHE)))

    def finish_samples(self, count: int) -> None:
        for _ in range(count):
            position = self.random.randrange(len(self.running))
            self.running[position], self.running[-1] = self.running[-1], self.running[position]
            worker, lease, index = self.running.pop()
            self.handle(inputs.Received(worker, messages.Generated(lease.key(index), SAMPLE)))

    def train_step(self) -> None:
        """Trains a batch; every server takes the new weights."""
        version = self.core.version
        self.handle(inputs.BatchRequested(0, version))
        while not self.core.state.in_batch:
            self.finish_samples(1)
        self.handle(inputs.Received("trainer-0", messages.StepDone(version + 1, {})))
        for name in self.core.fleet.rollout:
            self.handle(inputs.UpdateStarted(name))
            self.handle(inputs.ServerUpdated(name, version=version + 1))

    def heartbeat_s(self) -> float:
        """Returns the median time of a heartbeat."""
        self.times.clear()
        for name in list(self.core.fleet.rollout)[:NUM_TICKS]:
            self.report(name)
        return statistics.median(self.times)

    def tick_s(self) -> float:
        """Returns the median time of the event of each second, in which no deadline passes."""
        self.times.clear()
        for _ in range(NUM_TICKS):
            self.handle(inputs.Tick())
        return statistics.median(self.times)

    def lose(self, count: int) -> None:
        lost = {f"rollout-{n}" for n in range(count)}
        for name in sorted(lost):
            self.handle(inputs.WorkerLost(name))
        self.running = [reply for reply in self.running if reply[0] not in lost]

    def evaluate(self, count: int) -> None:
        prompts = [Prompt(f"eval-{n}", PROMPT, {}) for n in range(count)]
        tasks = [EvaluationTask("held_out", prompt, 0, 8, 0.0) for prompt in prompts]
        self.handle(inputs.EvaluationRequested(0, "pause", tasks))


def steady(num_servers: int) -> Run:
    return Run(num_servers, prompts_per_step=num_servers * 8, max_staleness=4)


def awaited() -> Run:
    """4,096 pending groups, almost all of them ready, and the trainer waits for its batch."""
    run = Run(64, prompts_per_step=4096, max_staleness=0)
    while len(run.running) > 3000:
        run.finish_samples(1)
    run.handle(inputs.BatchRequested(0, 0))
    return run


def large(num_servers: int) -> Run:
    """Batches of 512 x 16 that run 8 versions ahead."""
    return Run(num_servers, prompts_per_step=512, max_staleness=8, num_samples=16)


def bytes_per_group() -> float:
    """Returns the memory of an admitted group without arrays of its samples."""
    core = large(0).core
    tracemalloc.start()
    groups = [core.state.admit() for _ in range(4096)]
    core.state.take_events()
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return num_bytes / len(groups)


def longest_collection_ms(freeze: bool) -> float:
    """Returns the longest garbage collection of 4 steps, beside a dataset of 200,000 prompts."""
    dataset = [Prompt(str(n), PROMPT, {"answer": {"text": str(n)}}) for n in range(200_000)]
    if freeze:  # as the controller does after its start
        gc.collect()
        gc.freeze()
    began, found = 0.0, [0.0]

    def note(phase: str, _: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        else:
            found.append(time.thread_time() - began)

    gc.callbacks.append(note)
    run = large(2048)
    for _ in range(4):
        run.train_step()
    gc.callbacks.remove(note)
    gc.unfreeze()
    del dataset
    return 1e3 * max(found)


SCENARIOS: dict[str, tuple[Callable[[], Run], Callable[[Run], None]]] = {
    "8 servers": (lambda: steady(8), lambda run: None),
    "64 servers": (lambda: steady(64), lambda run: None),
    "512 servers": (lambda: steady(512), lambda run: None),
    "2,048 servers": (lambda: steady(2048), lambda run: None),
    "8 servers, 512 x 16": (lambda: large(8), lambda run: None),
    "2,048 servers, 512 x 16": (lambda: large(2048), lambda run: None),
    "2,048 servers, 512 x 16, a step": (lambda: large(2048), Run.train_step),
    "8 of 64 servers are lost": (lambda: steady(64), lambda run: run.lose(8)),
    "32 of 512 servers are lost": (lambda: steady(512), lambda run: run.lose(32)),
    "128 of 2,048 servers are lost": (lambda: steady(2048), lambda run: run.lose(128)),
    "evaluation of 1,000 prompts begins, 64 servers": (
        lambda: steady(64),
        lambda run: run.evaluate(1000),
    ),
    "evaluation of 8,000 prompts begins, 2,048 servers": (
        lambda: steady(2048),
        lambda run: run.evaluate(8000),
    ),
    "4,096 pending groups, batch awaited, 64 servers": (awaited, lambda run: None),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=2000, help="events to time after each change")
    arguments = parser.parse_args()
    columns = "us per event | events/s | us per tick | us per heartbeat"
    print(f"| state | {columns} | slowest event of the change, ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, (begin, change) in SCENARIOS.items():
        run = begin()
        run.finish_samples(200)  # warm-up
        run.times.clear()
        change(run)
        slowest_ms = f"{1e3 * max(run.times):.1f}" if run.times else "-"
        run.times.clear()
        run.finish_samples(arguments.events // 2)  # each is a reply and a score
        mean = sum(run.times) / len(run.times)
        figures = f"{1e6 * mean:.0f} | {1 / mean:,.0f} | {1e6 * run.tick_s():.0f}"
        figures += f" | {1e6 * run.heartbeat_s():.0f} | {slowest_ms}"
        print(f"| {name} | {figures} |", flush=True)
    print(f"\nmemory of an admitted group of 16: {bytes_per_group():,.0f} bytes")
    pauses = " and ".join(f"{longest_collection_ms(freeze):.0f}" for freeze in (False, True))
    print(f"longest garbage collection, with and without the dataset: {pauses} ms")


if __name__ == "__main__":
    main()
