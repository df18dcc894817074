"""The reward worker: python -m megatron_async_rl.reward RUN_DIR NAME

Answers each `ScoreRequest` of the controller with a `ScoreResult`, in any order. Its tasks, and
when each one proceeds:

    _receive           at a message: scores plain answers inline, queues others; ends at Shutdown
    _score             (one per slot of the worker) at a queued request
    _send_heartbeats   every HEARTBEAT_S
    SIGTERM            ends the process like Shutdown

The first task to end ends the process. The controller keeps the queue bounded: it sends at most
`capacity` (in Hello) requests at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.config import load
from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.protocol.messages import Heartbeat, Hello, ScoreRequest, Shutdown
from megatron_async_rl.reward.worker import RewardWorker

HEARTBEAT_S = 2.0
REQUESTS_PER_PROCESS = 64  # accepted at a time, per scoring process

log = logging.getLogger(__name__)


async def _serve(run_dir: Path, name: str) -> None:
    config = load.load(run_dir / "config.yaml")
    worker = RewardWorker(config.reward, config.sandbox)
    link = Link(run_dir)
    try:
        capacity = config.reward.processes_per_worker * REQUESTS_PER_PROCESS
        await link.join(Hello(role="reward", name=name, pid=os.getpid(), capacity=capacity))
        sigterm = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sigterm.set)
        queue: asyncio.Queue[ScoreRequest] = asyncio.Queue()
        await link.serve(
            _send_heartbeats(link, queue),
            _receive(link, worker, queue),
            sigterm.wait(),
            *(_score(link, worker, queue) for _ in range(worker.slots)),
        )
    finally:
        worker.stop()
        link.close()


async def _receive(link: Link, worker: RewardWorker, queue: asyncio.Queue[ScoreRequest]) -> None:
    await worker.start()
    while True:
        message = await link.receive()
        match message:
            case ScoreRequest():
                if result := worker.score_inline(message):
                    await link.send(result)
                else:
                    queue.put_nowait(message)
            case Shutdown():
                log.info("shut down by the controller: %s", message.reason)
                return
            case _:
                raise ProtocolError(f"a reward worker received {type(message).__name__}")


async def _score(link: Link, worker: RewardWorker, queue: asyncio.Queue[ScoreRequest]) -> None:
    while True:
        await link.send(await worker.score(await queue.get()))


async def _send_heartbeats(link: Link, queue: asyncio.Queue[ScoreRequest]) -> None:
    while True:
        await link.send(Heartbeat(running=queue.qsize()))
        await asyncio.sleep(HEARTBEAT_S)


if __name__ == "__main__":
    processes.main(lambda: asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2])))
