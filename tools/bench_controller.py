"""How many trajectories one controller takes in per second: CURVE, core and journal on, everything of it on one core.

    python tools/bench_controller.py [--seconds 10] [--tokens 32768] [--clients 2] [--no-journal] [--deliver]

A trajectory is 32,768 tokens with logprobs and versions: 393,216 bytes. Clients are processes on the other cores: they
answer every lease with one, and every verdict asked for. `--deliver` sends each cut batch on to a trainer, too.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_async_rl import processes
from megatron_async_rl.controller.actions import Action, CutBatch, Send
from megatron_async_rl.controller.batching import train_sample
from megatron_async_rl.controller.core import Core
from megatron_async_rl.controller.journal import JOURNAL_FILE, Journal
from megatron_async_rl.controller.rules import Rules
from megatron_async_rl.messages import (
    Generate,
    Generated,
    GetBatch,
    Hello,
    Score,
    Scored,
    Shutdown,
    StepDone,
    TrainBatch,
    Welcome,
)
from megatron_async_rl.transport import Hub, Link, Peer
from megatron_async_rl.types import NOT_GENERATED, Prompt, Sample

GROUPS_PER_STEP, SAMPLES = 16, 8
IN_FLIGHT = 64  # per rollout client
NUM_PROMPT = 16


def client(run_dir: str, name: str, tokens: int, core: int) -> None:
    processes.die_with_parent()
    os.sched_setaffinity(0, {core})
    versions = np.zeros(tokens, np.int32)
    versions[:NUM_PROMPT] = NOT_GENERATED
    ids, logprobs = np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.float32)

    async def body() -> None:
        link = Link(Path(run_dir))
        await link.join(
            Hello("rollout" if name.startswith("rollout") else "reward", name, os.getpid(), capacity=IN_FLIGHT)
        )
        while not isinstance(message := await link.receive(), Shutdown):
            if isinstance(message, Generate):
                versions[NUM_PROMPT:] = message.floor_version
                for index in message.indices:
                    sample = Sample(ids=ids, logprobs=logprobs, versions=versions, stop="stop", text="4")
                    who = (message.epoch, message.group_id, message.attempt, index)
                    await link.send(Generated(*who, sample))
            elif isinstance(message, Score):
                await link.send(Scored(message.epoch, message.group_id, message.attempt, message.index, 1.0))
        link.close()

    asyncio.run(body())


def trainer(run_dir: str, core: int) -> None:
    processes.die_with_parent()
    os.sched_setaffinity(0, {core})

    async def body() -> None:
        link = Link(Path(run_dir))
        await link.join(Hello("trainer", "trainer-0", os.getpid(), leader=0))
        await link.send(GetBatch(0))
        while not isinstance(message := await link.receive(), Shutdown):
            if isinstance(message, TrainBatch):
                await link.send(StepDone(message.version + 1, {}))
                await link.send(GetBatch(message.version + 1))
        link.close()

    asyncio.run(body())


class Bench:
    """The controller's shell without its stages: what comes in goes to the core, what comes out is done."""

    def __init__(self, hub: Hub, journal: Journal | None, deliver: bool) -> None:
        numbers = itertools.count()
        rules = Rules(
            prompts_per_step=GROUPS_PER_STEP, samples_per_prompt=SAMPLES, eta=2, wait_for_stragglers=False,
            straggler_wait_s=1.0, max_new_tokens=8, temperature=1.0, eval_temperature=0.0, lease_timeout_s=600.0,
            max_attempts=3, max_verdict_attempts=3, drop_equal_rewards=False, silence_limit_s=600.0, steps=10**9,
            data_parallel_size=1,
        )  # fmt: skip
        self.core = Core(rules, lambda: Prompt(str(next(numbers)), np.arange(NUM_PROMPT, dtype=np.int32), {}))
        self.core.admitting = True
        self.hub, self.journal, self.deliver = hub, journal, deliver
        self.names: dict[Peer, str] = {}
        self.peers: dict[str, Peer] = {}
        self.taken = 0

    async def act(self, actions: list[Action]) -> None:
        facts = self.core.take_facts()
        if self.journal:
            self.journal.append(facts)
        for action in actions:
            if isinstance(action, Send):
                await self.hub.send(self.peers[action.worker], action.message)
            elif isinstance(action, CutBatch):
                if self.journal:
                    await self.journal.durable()
                samples = [train_sample(s, 0.0) for group in action.groups for s in group.samples]
                batch = TrainBatch(action.version, samples if self.deliver else [])
                await self.hub.send(self.peers["trainer-0"], batch)

    async def serve(self, seconds: float, num_peers: int) -> tuple[float, float]:
        """Trajectories per second and CPU seconds of this process for each, after a first quarter that does not count."""
        while len(self.names) < num_peers:
            await self._one()
        await self._for(seconds / 4)
        taken, began, cpu = self.taken, time.monotonic(), time.process_time()
        await self._for(seconds)
        if self.journal:
            await self.journal.durable()
        taken, cpu = self.taken - taken, time.process_time() - cpu
        for peer in self.peers.values():
            await self.hub.send(peer, Shutdown("done"))
        return taken / (time.monotonic() - began), cpu / max(taken, 1)

    async def _for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await self._one()

    async def _one(self) -> None:
        core = self.core
        peer, message = await self.hub.receive()
        if isinstance(message, Hello):
            self.names[peer], self.peers[message.name] = message.name, peer
            await self.hub.send(peer, Welcome(core.epoch))
            if message.role == "rollout":
                await self.act(core.rollout_joined(message.name, message.capacity, 0.0))
                await self.act(core.serving(message.name, core.version, 0.0))
            elif message.role == "reward":
                await self.act(core.reward_joined(message.name, message.capacity, 0.0))
        elif isinstance(message, Generated):
            self.taken += 1
            await self.act(core.generated(self.names[peer], message, 0.0))
        elif isinstance(message, Scored):
            await self.act(core.scored(self.names[peer], message, 0.0))
        elif isinstance(message, GetBatch):
            await self.act(core.batch_wanted(0, message.version, 0.0))
        elif isinstance(message, StepDone):
            if self.journal:  # as after a checkpoint of every step: the file does not grow without end
                self.journal.prune([group.group_id for group in core.books.in_batch])
            await self.act(core.step_done(message.version, 0.0))
            for worker in list(core.fleet.rollout):
                core.updating(worker)
                await self.act(core.serving(worker, core.version, 0.0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--no-journal", action="store_true")
    parser.add_argument("--deliver", action="store_true")
    parser.add_argument("--dir", default=None, help="where the journal lies; default: a temporary folder")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        names = [*(f"rollout-{i}" for i in range(arguments.clients)), "reward-0"]
        others = cores[1:] or cores
        children = [
            spawn.Process(target=client, args=(folder, name, arguments.tokens, others[i % len(others)]))
            for i, name in enumerate(names)
        ]
        children.append(spawn.Process(target=trainer, args=(folder, others[-1])))
        for child in children:
            child.start()
        os.sched_setaffinity(0, {cores[0]})  # all threads made from here on: zmq's, the journal's

        async def body() -> tuple[float, float]:
            hub = Hub(Path(folder))
            journal = None if arguments.no_journal else Journal(Path(folder) / JOURNAL_FILE)
            try:
                return await Bench(hub, journal, arguments.deliver).serve(arguments.seconds, len(children))
            finally:
                hub.close()
                if journal:
                    journal.close()

        rate, cpu = asyncio.run(body())
        for child in children:
            child.join(10)
    size = arguments.tokens * 12
    print(
        f"{rate:.0f} trajectories/s of {size:,} bytes = {rate * size / 1e6:.0f} MB/s; CURVE on, "
        f"journal {'off' if arguments.no_journal else 'on'}, delivery {'on' if arguments.deliver else 'off'}, "
        f"{1e3 * cpu:.2f} ms of CPU each: {1 / cpu:.0f} per second of one core"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
