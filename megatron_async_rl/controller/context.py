"""The queue that the controller's loop reads, and the objects that all its parts share."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.inputs import CoreEvent
from megatron_async_rl.controller.journal.journal import Journal
from megatron_async_rl.controller.monitoring.progress import Progress
from megatron_async_rl.controller.workers import Workers
from megatron_async_rl.protocol.hub import Peer
from megatron_async_rl.protocol.wire import AnyMessage, Malformed, UnknownHello

MAX_QUEUED = 16  # messages; the others wait in their sockets
Applied = asyncio.Future[None]


@dataclass(frozen=True)
class MessageArrived:
    peer: Peer
    message: AnyMessage | UnknownHello | Malformed


class EventQueue:
    """First in, first out. The loop itself must not `put` or `submit`: both wait for the loop.

    A deque and an Event: asyncio.Queue costs several times as much per message.
    """

    def __init__(self) -> None:
        self._events: deque[tuple[MessageArrived | CoreEvent, Applied | None]] = deque()
        self._arrived = asyncio.Event()
        self._empty = asyncio.Event()
        self._is_closed = False

    def close(self) -> None:
        """Cancels later calls of `submit`: the loop has ended, and a task may clean up."""
        self._is_closed = True

    async def put(self, message: MessageArrived) -> None:
        """Queues a message; a full queue must become empty before."""
        if len(self._events) >= MAX_QUEUED:
            self._empty.clear()
            await self._empty.wait()
        self._events.append((message, None))
        self._arrived.set()

    async def submit(self, event: CoreEvent) -> None:
        """Returns when the event is applied: journaled, and its actions carried out."""
        if self._is_closed:
            raise asyncio.CancelledError
        applied: Applied = asyncio.get_running_loop().create_future()
        self._events.append((event, applied))
        self._arrived.set()
        await applied

    async def get(self) -> tuple[MessageArrived | CoreEvent, Applied | None]:
        """Returns the next event, and the future to resolve when it is applied."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if not self._events:
            self._empty.set()
        return event


@dataclass(frozen=True)
class Context:
    config: Config
    core: Core  # read by all parts, changed only by the loop
    queue: EventQueue
    workers: Workers
    journal: Journal
    progress: Progress
