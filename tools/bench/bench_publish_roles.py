"""Processes of tools/bench/bench_publish.py: trainer ranks, rollout worker, plain broadcast."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import msgspec
from bench_publish_setup import parse_bucket, rounds

from megatron_async_rl.config import load as configuration
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.protocol.messages import Hello
from megatron_async_rl.protocol.sync_link import SyncLink
from megatron_async_rl.rollout.engine_process import SGLangServer
from megatron_async_rl.rollout.interruption import Abort, Interruption, Pause
from megatron_async_rl.rollout.worker import RolloutWorker
from megatron_async_rl.rollout.workflows.single_turn import SingleTurn


def trainer(arguments: argparse.Namespace) -> None:
    """Runs one trainer rank, which publishes `--updates` versions in each round."""
    from megatron_async_rl import patches

    patches.prepare_megatron()
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    from megatron_async_rl.trainer import parallel
    from megatron_async_rl.trainer.model import build
    from megatron_async_rl.weights.publish import WeightPublisher

    settings = configuration.load(arguments.out / "config.yaml")
    parallel.init_parallel(settings)
    _, shape, modules = build.build_modules(settings)
    socket = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        socket = SyncLink(arguments.out)
        socket.join(Hello("trainer", f"trainer-{dist.get_rank()}", os.getpid(), stage=0))
    version = 0
    for a_round in rounds(arguments):
        weights = msgspec.structs.replace(
            settings.weights, bucket_bytes=a_round.bucket_bytes, broadcast_unit=a_round.wire
        )
        publisher = WeightPublisher(
            modules, shape, msgspec.structs.replace(settings, weights=weights), socket
        )
        for _ in range(arguments.updates):
            publisher.publish(version)
            version += 1
    if arguments.kill:
        publisher.publish(version)
        publisher.publish(version + 1)


class InterruptionByRound:
    """Interrupts in the mode of the current round.

    Without a prefix cache there is nothing to drop, and any SGLang can retract.
    """

    def __init__(self, modes: dict[str, Interruption], plan: list[str], has_prefixes: bool) -> None:
        self._has_prefixes = has_prefixes
        self._modes = modes
        self._plan = plan
        self._mode = modes[plan[0]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mode, name)

    @property
    def flushes_cache(self) -> bool:
        return self._has_prefixes and self._mode.flushes_cache

    async def stop(self) -> None:
        self._mode = self._modes[self._plan.pop(0) if self._plan else "abort"]
        await self._mode.stop()


def rollout(arguments: argparse.Namespace) -> None:
    """Runs the product's worker; one start of the engine serves all interruption modes."""

    async def serve() -> None:
        settings = configuration.load(arguments.out / "config.yaml")
        server = SGLangServer(settings, arguments.out, "rollout-0")
        try:
            await server.start()
            link = Link(arguments.out)
            worker = RolloutWorker("rollout-0", settings, link, server, SingleTurn())
            updates = worker.updates
            modes: dict[str, Interruption] = {
                "abort": Abort(server.client, worker.gate, settings.rollout.request_timeout_s),
                "retract": Pause(server.client, "retract"),
                "keep": Pause(server.client, "in_place"),
            }
            plan = [
                a_round.interrupt for a_round in rounds(arguments) for _ in range(arguments.updates)
            ]
            updates.interruption = InterruptionByRound(
                modes, plan, has_prefixes=not arguments.no_radix_cache
            )
            try:
                await worker.run()
            finally:
                link.close()
        finally:
            await server.stop()

    asyncio.run(serve())


def baseline(rank: int, port: int, device: str, buckets: list[str], total_bytes: int) -> None:
    """Broadcasts `total_bytes` between two processes in flat buffers; prints the best of five."""
    import torch
    import torch.distributed as dist

    backend, device_name = ("nccl", "cuda") if device == "cuda" else ("gloo", "cpu")
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for size in sorted({parse_bucket(text)[0] for text in buckets}):
        buffers = [
            torch.ones(min(size, total_bytes), dtype=torch.uint8, device=device_name)
            for _ in range(2)
        ]
        best = float("inf")
        for attempt in range(6):
            dist.barrier()
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.monotonic()
            left, number = total_bytes, 0
            while left > 0:
                dist.broadcast(buffers[number % 2][: min(size, left)], src=0)
                left, number = left - size, number + 1
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.monotonic() - started) if attempt else best
        if rank == 0:
            print(json.dumps({"bucket_bytes": size, "seconds": best}), flush=True)
        del buffers
    dist.destroy_process_group()


def baseline_seconds(log: Path) -> dict[int, float]:
    """Returns the seconds by bucket size, from the log of the first process."""
    lines = log.read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"bucket_bytes"')]
    return {row["bucket_bytes"]: row["seconds"] for row in found}
