"""The controller side of tools/bench/bench_publish.py."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

import numpy as np
import psutil
from bench_publish_setup import PROMPT_TOKENS, SHAPES, UPDATE_TIMEOUT_S, rounds

from megatron_async_rl.controller.weight_sync.broadcast import BroadcastPublisher
from megatron_async_rl.controller.weight_sync.session import Outcome, UpdateSession
from megatron_async_rl.errors import Error, PublishError
from megatron_async_rl.protocol.messages import (
    Failed,
    Generate,
    Generated,
    GenerateFailed,
    Heartbeat,
    Hello,
    Message,
    Shutdown,
    Welcome,
)
from megatron_async_rl.protocol.transport import Hub, Peer
from megatron_async_rl.protocol.types import Prompt
from megatron_async_rl.protocol.weight_messages import (
    BucketsSent,
    GroupJoined,
    GroupOpened,
    PublishOffer,
    ReceiveBuckets,
    Updated,
    UpdateReady,
)


class Bench:
    """Accepts trainer and rollout worker, keeps the worker busy, and runs the updates."""

    def __init__(self, hub: Hub, arguments: argparse.Namespace, rollout_pid: int) -> None:
        self._hub = hub
        self.rollout_pid = rollout_pid
        self._arguments = arguments
        self._peers: dict[str, Peer] = {}
        self._offers: asyncio.Queue[tuple[str, PublishOffer]] = asyncio.Queue()
        self._next_group = 0
        self._rng = np.random.default_rng(0)
        self.publisher = BroadcastPublisher(
            UpdateSession(self._send, UPDATE_TIMEOUT_S), arguments.engine_tp, verify_every=2
        )
        self.num_failed = self.num_generated = self.num_running = 0
        self._server_to_kill: psutil.Process | None = None

    async def _send(self, name: str, message: Message) -> None:
        await self._hub.send(self._peers[name], message)
        if isinstance(message, ReceiveBuckets) and self._server_to_kill is not None:
            await asyncio.sleep(0.01)
            for process in self._server_to_kill.children(recursive=True):
                process.kill()

    async def receive(self) -> None:
        while True:
            peer, message = await self._hub.receive()
            name = next((n for n, p in self._peers.items() if p == peer), "")
            if isinstance(message, Hello):
                self._peers[message.name] = peer
                await self._hub.send(peer, Welcome(0))
                print(f"{message.name} joined", flush=True)
            elif isinstance(message, PublishOffer):
                self._offers.put_nowait((name, message))
            elif isinstance(message, Generated):
                self.num_generated += message.sample.num_generated
                await self.lease()
            elif isinstance(message, GenerateFailed):
                self.num_failed += 1
                print(f"a sample failed: {message.error}", flush=True)
                await self.lease()
            elif isinstance(
                message, UpdateReady | GroupOpened | GroupJoined | BucketsSent | Updated
            ):
                self.publisher.session.inbox.put_nowait((name, message))
            elif isinstance(message, Failed):
                if self._server_to_kill is None:
                    raise Error(f"{name}: {message.error}")
            elif isinstance(message, Heartbeat):
                self.num_running = message.running

    async def lease(self) -> None:
        ids = self._rng.integers(
            3, SHAPES[self._arguments.model]["vocab_size"], PROMPT_TOKENS
        ).astype(np.int32)
        self._next_group += 1
        prompt = Prompt(str(self._next_group), ids, {})
        lease = Generate(
            0, self._next_group, 0, [0], "train", prompt, self._arguments.new_tokens, 1.0
        )
        await self._send("rollout-0", lease)

    async def publish(self, version: int) -> tuple[Outcome, PublishOffer]:
        name, offer = await asyncio.wait_for(self._offers.get(), 300)
        outcome = await self.publisher.publish(version, {name: offer}, ["rollout-0"])
        return outcome, offer

    async def run(self) -> list[dict[str, Any]]:
        while "rollout-0" not in self._peers:
            await asyncio.sleep(0.2)
        rows: list[dict[str, Any]] = []
        version = 0
        for kind in rounds(self._arguments):
            if kind.busy and not self._next_group:
                for _ in range(self._arguments.requests):
                    await self.lease()
                await asyncio.sleep(kind.gap_s)
            self.publisher.forget_groups()
            for number in range(self._arguments.updates):
                outcome, offer = await self.publish(version)
                total_bytes = sum(
                    spec_bytes(t.dtype, t.shape) for b in offer.buckets for t in b.tensors
                )
                row = {
                    "version": version,
                    "bucket_bytes": kind.bucket_bytes,
                    "wire": kind.wire,
                    "interrupt": kind.interrupt,
                    "busy": kind.busy,
                    "gap_s": kind.gap_s,
                    "buckets": len(offer.buckets),
                    "bytes": total_bytes,
                    "first": number == 0,
                    "verified": "trainer_digest" in outcome.seconds,
                    "interrupted": outcome.num_interrupted,
                    "peak_bytes": outcome.peak_bytes,
                    "fenced": outcome.fenced,
                    "seconds": outcome.seconds,
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
                (self._arguments.out / "updates.json").write_text(json.dumps(rows, indent=1))
                version += 1
                await asyncio.sleep(kind.gap_s)
        if self._arguments.kill:
            await self._kill_server_during_update(version)
        for name in self._peers:
            await self._send(name, Shutdown("the benchmark is over"))
        return rows

    async def _kill_server_during_update(self, version: int) -> None:
        """Kills the server while it receives buckets: the update must fail and be offered again."""
        self._server_to_kill = psutil.Process(self.rollout_pid)
        started = time.monotonic()
        try:
            await self.publish(version)
            print("the update succeeded although the server was killed", flush=True)
        except PublishError as e:
            seconds = time.monotonic() - started
            print(f"server killed: the update failed after {seconds:.1f} s: {e}", flush=True)
        _, offer = await asyncio.wait_for(self._offers.get(), 60)
        print(f"the trainer is alive and offers version {offer.version}", flush=True)


def spec_bytes(dtype: str, shape: list[int]) -> int:
    return int(np.prod(shape)) * (4 if dtype == "float32" else 2)
