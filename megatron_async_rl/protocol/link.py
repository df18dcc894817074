"""A worker's connection to the controller under asyncio, and how every worker joins.

sync_link.py has the connection for code that blocks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import zmq.asyncio

from megatron_async_rl import __version__, addresses
from megatron_async_rl.errors import Error, ProtocolError
from megatron_async_rl.protocol import messages, sockets, wire
from megatron_async_rl.protocol.messages import Hello, Message, Refused
from megatron_async_rl.protocol.wire import SCHEMA, AnyMessage, Codec

JOIN_S = 600.0  # for the answer to the first Hello: the controller may read a long journal
REJOIN_S = 10.0  # for the answer to a Hello; until then no RejoinRequest causes another
HELLO_AGAIN_S = 120.0  # then a Hello is repeated: its answer may be lost
SILENCE_S = 5.0  # then a Heartbeat makes a controller that does not know this worker say so


def with_versions(hello: Hello) -> Hello:
    """Adds the package version and message schema, which the controller compares with its own."""
    return msgspec.structs.replace(hello, package=__version__, schema=SCHEMA)


class Rejoining:
    """Decides when a Hello is sent: first, after a RejoinRequest, and to a silent controller.

    Heartbeats wait in the socket while the controller restarts, and each gets a RejoinRequest. A
    second Hello would void the leases and the offer that followed the first one.
    """

    def __init__(self) -> None:
        self._since: float | None = None  # when the unanswered Hello was sent

    def is_overdue(self) -> bool:
        """Returns whether the Hello, or its answer, must be lost; notes that it is sent again."""
        now = time.monotonic()
        if self._since is None or now - self._since < HELLO_AGAIN_S:
            return False
        self._since = now
        return True

    def needs_hello(self) -> bool:
        """Returns whether to send a Hello now, and notes it."""
        now = time.monotonic()
        if self._since is not None and now - self._since < REJOIN_S:
            return False
        self._since = now
        return True

    def welcomed(self) -> None:
        self._since = None


class Link:
    """A worker's socket under asyncio."""

    def __init__(self, run_dir: Path, timeout_s: float = 60.0) -> None:
        addresses.raise_descriptor_limit()  # a rollout worker has connections for each sample
        self._context = zmq.asyncio.Context()
        self._socket = sockets.connect(self._context, run_dir, timeout_s)
        self._codec = Codec()
        self._rejoining = Rejoining()

    async def join(self, hello: Hello | Callable[[], Hello], timeout_s: float = JOIN_S) -> int:
        """Sends Hello and returns the controller's epoch.

        Raises ProtocolError if refused or not answered.
        A callable is called for every RejoinRequest too: all earlier leases are void then.
        """
        self._hello = lambda: with_versions(hello() if callable(hello) else hello)
        deadline = time.monotonic() + timeout_s
        self._rejoining.needs_hello()
        await self.send(self._hello())
        while (left_s := deadline - time.monotonic()) > 0:
            if await self._socket.poll(1000 * min(left_s, SILENCE_S)):
                message = await self._receive()
                if (epoch := epoch_of(message)) is not None:
                    self._rejoining.welcomed()
                    return epoch
                if isinstance(message, messages.Shutdown):
                    raise ProtocolError(f"the run ends: {message.reason}")
                if isinstance(message, messages.RejoinRequest) and self._rejoining.needs_hello():
                    await self.send(self._hello())
            else:
                is_overdue = self._rejoining.is_overdue()
                await self.send(self._hello() if is_overdue else messages.Heartbeat())
        raise ProtocolError(f"the controller did not answer within {timeout_s:.0f} s")

    async def receive(self) -> AnyMessage:
        """Returns the next message; answers RejoinRequest by itself."""
        while True:
            message = await self._receive()
            if isinstance(message, messages.RejoinRequest):
                if self._rejoining.needs_hello():
                    await self.send(self._hello())
            elif isinstance(message, Refused):
                raise refusal(message)
            elif isinstance(message, messages.Welcome):
                self._rejoining.welcomed()
            else:
                return message

    async def _receive(self) -> AnyMessage:
        return self._codec.decode(await self._socket.recv_multipart())

    async def send(self, message: Message) -> None:
        await self.send_encoded(self._codec.encode(message))

    async def send_encoded(self, frames: list[wire.Frame]) -> None:
        await self._socket.send_multipart(frames, copy=False)

    async def serve(self, *loops: Coroutine[Any, Any, object]) -> None:
        """Runs the loops of a worker until the first one ends, and cancels the others.

        Reports an Error of theirs to the controller, and raises it.
        """
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Error as e:
            await self.send(messages.Failed(str(e)))
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def epoch_of(answer: AnyMessage) -> int | None:
    """Returns the epoch of a Welcome. None for other messages: the Welcome was lost.

    Raises ProtocolError for Refused.
    """
    if isinstance(answer, Refused):
        raise refusal(answer)
    return answer.epoch if isinstance(answer, messages.Welcome) else None


def refusal(answer: Refused) -> ProtocolError:
    return ProtocolError(f"the controller refused this worker: {answer.reason}")
