"""The queue that the controller's loop reads, and the objects that all its parts share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.inputs import CoreEvent
from megatron_async_rl.controller.journal.journal import Journal
from megatron_async_rl.controller.progress import Progress
from megatron_async_rl.controller.workers import Workers
from megatron_async_rl.protocol.messages import AnyMessage
from megatron_async_rl.protocol.transport import Peer
from megatron_async_rl.protocol.wire import Malformed, UnknownHello

MAX_QUEUED = 16  # messages; the others wait in their sockets
Applied = asyncio.Future[None]


@dataclass(frozen=True)
class MessageArrived:
    peer: Peer
    message: AnyMessage | UnknownHello | Malformed


class EventQueue:
    """First in, first out. The loop itself must not `put` or `submit`: both wait for the loop."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[MessageArrived | CoreEvent, Applied | None]] = (
            asyncio.Queue()
        )
        self._room = asyncio.Semaphore(MAX_QUEUED)

    async def put(self, message: MessageArrived) -> None:
        """Queues a message; waits while too many are queued."""
        await self._room.acquire()
        self._queue.put_nowait((message, None))

    async def submit(self, event: CoreEvent) -> None:
        """Returns when the event is applied: journaled, and its actions carried out."""
        applied: Applied = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((event, applied))
        await applied

    async def get(self) -> tuple[MessageArrived | CoreEvent, Applied | None]:
        """Returns the next event, and the future to resolve when it is applied."""
        event, applied = await self._queue.get()
        if isinstance(event, MessageArrived):
            self._room.release()
        return event, applied


@dataclass(frozen=True)
class Context:
    config: Config
    core: Core  # read by all parts, changed only by the loop
    queue: EventQueue
    workers: Workers
    journal: Journal
    progress: Progress
