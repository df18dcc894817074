"""The controller side of tools/bench/bench_publish.py."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

import numpy as np
import psutil
from bench_control import Control, num_bytes
from bench_models import SHAPES
from bench_publish_setup import PROMPT_TOKENS, UPDATE_TIMEOUT_S, rounds

from megatron_async_rl.controller.weight_sync.broadcast import BroadcastPublisher
from megatron_async_rl.controller.weight_sync.session import UpdateSession
from megatron_async_rl.errors import PublishError
from megatron_async_rl.protocol.messages import (
    Failed,
    Generate,
    Generated,
    GenerateFailed,
    Message,
)
from megatron_async_rl.protocol.types import Prompt
from megatron_async_rl.protocol.weight_messages import ReceiveBuckets

START_TIMEOUT_S = 1200.0


class Bench(Control):
    """Accepts trainer and rollout worker, keeps the worker busy, and runs the updates."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments.out)
        self.rollout_pid = 0
        self._arguments = arguments
        self._next_group = 0
        self._rng = np.random.default_rng(0)
        self.publisher = BroadcastPublisher(
            UpdateSession(self.send, UPDATE_TIMEOUT_S), arguments.engine_tp, verify_every=2
        )
        self.num_failed = self.num_generated = 0
        self._server_to_kill: psutil.Process | None = None

    async def send(self, name: str, message: Message) -> None:
        await super().send(name, message)
        if isinstance(message, ReceiveBuckets) and self._server_to_kill is not None:
            await asyncio.sleep(0.01)
            for process in self._server_to_kill.children(recursive=True):
                process.kill()

    async def handle(self, name: str, message: Message) -> None:
        if isinstance(message, Generated):
            self.num_generated += message.sample.num_generated
            await self.lease()
        elif isinstance(message, GenerateFailed):
            self.num_failed += 1
            print(f"a sample failed: {message.error}", flush=True)
            await self.lease()
        elif not (isinstance(message, Failed) and self._server_to_kill):
            await super().handle(name, message)

    async def lease(self) -> None:
        ids = self._rng.integers(
            3, SHAPES[self._arguments.model]["vocab_size"], PROMPT_TOKENS
        ).astype(np.int32)
        self._next_group += 1
        prompt = Prompt(str(self._next_group), ids, {})
        lease = Generate(
            0, self._next_group, 0, [0], "train", prompt, self._arguments.new_tokens, 1.0
        )
        await self.send("rollout-0", lease)

    async def run(self) -> list[dict[str, Any]]:
        await self.wait_for("rollout-0", START_TIMEOUT_S)
        rows: list[dict[str, Any]] = []
        version = 0
        for kind in rounds(self._arguments):
            if kind.busy and not self._next_group:
                for _ in range(self._arguments.requests):
                    await self.lease()
                await asyncio.sleep(kind.gap_s)
            self.publisher.forget_groups()
            for number in range(self._arguments.updates):
                outcome, offer = await self.publish(self.publisher, version, "rollout-0")
                row = {
                    "version": version,
                    "bucket_bytes": kind.bucket_bytes,
                    "wire": kind.wire,
                    "interrupt": kind.interrupt,
                    "busy": kind.busy,
                    "gap_s": kind.gap_s,
                    "buckets": len(offer.buckets),
                    "bytes": num_bytes(offer),
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
        return rows

    async def _kill_server_during_update(self, version: int) -> None:
        """Kills the server while it receives buckets: the update must fail and be offered again."""
        self._server_to_kill = psutil.Process(self.rollout_pid)
        started = time.monotonic()
        try:
            await self.publish(self.publisher, version, "rollout-0")
            print("the update succeeded although the server was killed", flush=True)
        except PublishError as e:
            seconds = time.monotonic() - started
            print(f"server killed: the update failed after {seconds:.1f} s: {e}", flush=True)
        _, offer = await asyncio.wait_for(self._offers.get(), 60.0)
        print(f"the trainer is alive and offers version {offer.version}", flush=True)
