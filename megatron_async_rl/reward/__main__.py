"""The reward process: python -m megatron_async_rl.reward RUN_DIR NAME

Takes `Score` from the controller and answers each with `Scored`, in any order. Tasks and what they wait for:

    _receive    a message; answers what needs no child at once, queues the rest, ends at Shutdown
    _judge      (one per slot of the worker) a queued message, then its verdict
    _beat       the clock
    SIGTERM     ends it like Shutdown

The first of them to end ends the process. The queue is bounded by `capacity`, which the controller was told in Hello.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.config import load
from megatron_async_rl.errors import Error, ProtocolError
from megatron_async_rl.protocol.messages import Failed, Heartbeat, Hello, Score, Shutdown
from megatron_async_rl.protocol.transport import Link
from megatron_async_rl.reward.worker import RewardWorker

HEARTBEAT_S = 2.0
VERDICTS_PER_CHILD = 64  # verdicts at once that we take on, per child

log = logging.getLogger(__name__)


async def _serve(run_dir: Path, name: str) -> None:
    settings = load.load(run_dir / "config.yaml")
    worker = RewardWorker(settings.reward, settings.sandbox)
    link = Link(run_dir)
    try:
        capacity = settings.reward.processes_per_worker * VERDICTS_PER_CHILD
        await link.join(Hello(role="reward", name=name, pid=os.getpid(), capacity=capacity))
        try:
            await _work(link, worker)
        except Error as e:
            await link.send(Failed(error=str(e)))
            raise
    finally:
        worker.stop()
        link.close()


async def _work(link: Link, worker: RewardWorker) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    queue: asyncio.Queue[Score] = asyncio.Queue()
    tasks = [
        asyncio.create_task(_beat(link, queue)),
        asyncio.create_task(_receive(link, worker, queue)),
        asyncio.create_task(ended.wait()),
        *(asyncio.create_task(_judge(link, worker, queue)) for _ in range(worker.slots)),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in done:
        task.result()


async def _receive(link: Link, worker: RewardWorker, queue: asyncio.Queue[Score]) -> None:
    await worker.start()
    while True:
        message = await link.receive()
        match message:
            case Score():
                scored = worker.score_at_once(message)
                if scored is None:
                    queue.put_nowait(message)
                else:
                    await link.send(scored)
            case Shutdown():
                log.info("shut down by the controller: %s", message.reason)
                return
            case _:
                raise ProtocolError(f"a reward worker was sent {type(message).__name__}")


async def _judge(link: Link, worker: RewardWorker, queue: asyncio.Queue[Score]) -> None:
    while True:
        await link.send(await worker.score(await queue.get()))


async def _beat(link: Link, queue: asyncio.Queue[Score]) -> None:
    while True:
        await link.send(Heartbeat(running=queue.qsize()))
        await asyncio.sleep(HEARTBEAT_S)


def _run() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_async_rl.reward", description="A reward worker of a run."
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("name")
    arguments = parser.parse_args()
    processes.main(lambda: asyncio.run(_serve(arguments.run_dir, arguments.name)))


if __name__ == "__main__":
    _run()
