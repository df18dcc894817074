"""A rollout worker with a real SGLang server, whose weight updates a WeightController drives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from weight_ranks import WeightController

from megatron_async_rl.config.config import Config
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.protocol.weight_messages import LoadSnapshot, Updated
from megatron_async_rl.rollout.engine_process import SGLangServer
from megatron_async_rl.rollout.worker import RolloutWorker
from megatron_async_rl.rollout.workflows.single_turn import SingleTurn


@asynccontextmanager
async def engine_worker(
    config: Config, run_dir: Path, name: str
) -> AsyncIterator[tuple[SGLangServer, RolloutWorker]]:
    """Runs the worker and its server inside the block."""
    server = SGLangServer(config, run_dir, name)
    await server.start()
    link = Link(run_dir)
    worker = RolloutWorker(name, config, link, server, SingleTurn())
    running = asyncio.create_task(worker.run())
    try:
        yield server, worker
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        link.close()
        await server.stop()


async def load_snapshot(
    control: WeightController, name: str, folder: Path, version: int
) -> Updated:
    """Has the worker load a snapshot; returns its answer."""
    await control.send(name, LoadSnapshot(version, str(folder)))
    while True:
        _, message = await asyncio.wait_for(control.publisher.session.inbox.get(), 100)
        if isinstance(message, Updated) and message.version == version:
            return message
