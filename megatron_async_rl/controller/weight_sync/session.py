"""The messages of one weight update between controller, weight sources and servers.

    with session.update(version, sources, servers) as outcome:
        session.start_clock()                       one deadline for all waits until the next start
        await session.begin(servers, Message(..))   marks servers as updating, then sends
        await session.send(name, ...)
        replies = await session.collect(Kind, names, ...)
    outcome = await session.end()                   the trainer continues

A server that replies with an error or too late, or that is lost meanwhile, is fenced for this
update: nothing waits for it, it gets no more messages, and its replies are ignored. Used by
broadcast.py, snapshot.py and, with run.mode = rollout_only, by the RelabelPublisher below.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_async_rl.controller.core.actions import ServerLost
from megatron_async_rl.controller.core.inputs import CoreEvent, UpdateStarted
from megatron_async_rl.errors import PublishError
from megatron_async_rl.protocol.messages import Message
from megatron_async_rl.protocol.weight_messages import (
    AbandonUpdate,
    GroupJoined,
    Published,
    PublishOffer,
    Relabel,
    Updated,
)

M = TypeVar("M", bound=Message)
Send = Callable[[str, Message], Awaitable[None]]
Submit = Callable[[CoreEvent], Awaitable[None]]


@dataclass
class Outcome:
    """The result of an update."""

    version: int
    serving: list[str]
    fenced: dict[str, str] = field(default_factory=dict)  # server -> reason
    seconds: dict[str, float] = field(default_factory=dict)  # phase -> seconds of the slowest party
    num_interrupted: int = 0
    peak_bytes: int = 0  # largest GPU memory that a source used besides its model

    def add(self, replies: Iterable[Any]) -> None:
        """Adds the phase times of replies, and the interrupted requests of Updated ones."""
        for reply in replies:
            for phase, value in reply.seconds.items():
                self.seconds[phase] = max(self.seconds.get(phase, 0.0), value)
            self.num_interrupted += getattr(reply, "num_interrupted", 0)


class UpdateSession:
    """One update at a time; the controller's loop fills `inbox`. Names address workers.

    `submit`: to the controller's queue; None without a core (tests and benchmarks).
    """

    def __init__(self, send: Send, timeout_s: float, submit: Submit | None = None) -> None:
        self.inbox: asyncio.Queue[tuple[str, Message | ServerLost]] = asyncio.Queue()
        self.outcome = Outcome(-1, [])  # of the last update, also of a failed one
        self.timeout_s = timeout_s
        self._send = send
        self._submit = submit
        self._started = self._deadline = 0.0
        self._sources: frozenset[str] = frozenset()
        self._servers: frozenset[str] = frozenset()  # of the running update

    @contextmanager
    def update(
        self, version: int, sources: Collection[str], servers: Collection[str]
    ) -> Iterator[Outcome]:
        self._sources, self._servers = frozenset(sources), frozenset(servers)
        self.outcome = Outcome(version, [])
        self._started = time.monotonic()
        self.start_clock()
        try:
            yield self.outcome
        finally:
            self._servers = frozenset()

    def start_clock(self) -> None:
        self._deadline = time.monotonic() + self.timeout_s

    def lost(self, name: str) -> None:
        """Fences a server with a lost process, if the running update includes it."""
        if name in self._servers and name not in self.outcome.fenced:
            self.outcome.fenced[name] = (
                "lost during the update: its process failed, was silent or was replaced"
            )
            self.inbox.put_nowait((name, ServerLost(name)))  # wakes `collect`

    async def begin(self, servers: Iterable[str], message: Message) -> None:
        """Marks each server as updating before it gets the message that interrupts it."""
        for server in servers:
            if server not in self.outcome.fenced:  # lost while the others were told
                if self._submit:
                    await self._submit(UpdateStarted(server))
                await self.send(server, message)

    async def send(self, name: str, message: Message) -> None:
        """Sends nothing to a fenced server: a restarted process may have its name."""
        if name not in self.outcome.fenced:
            await self._send(name, message)

    async def release(self) -> None:
        """Notifies the sources that their part is done."""
        for source in sorted(self._sources):
            await self.send(source, Published(self.outcome.version, len(self.outcome.serving)))

    async def end(self, release: bool = True) -> Outcome:
        """Returns the outcome of the update, after the sources are released.

        Raises PublishError if no server took the version.
        """
        outcome = self.outcome
        if release:
            await self.release()
        outcome.seconds["total"] = time.monotonic() - self._started
        if not outcome.serving:
            raise PublishError(f"no server took version {outcome.version}: {outcome.fenced}")
        return outcome

    async def collect(
        self,
        kind: type[M],
        names: Collection[str],
        failed: dict[str, str] | None = None,
        stop_with: Collection[str] = (),
        **match: Any,
    ) -> dict[str, M]:
        """Returns the replies of a kind and the `match`ing version or group, by name.

        A server that does not reply, or is lost, is fenced and left out. A server that replies with
        an error is fenced too, or noted in `failed` if that is given. A source's error is returned.
        When one of the servers `stop_with` fails, the sources that are awaited are told to stop.
        """
        fenced = self.outcome.fenced
        failed = fenced if failed is None else failed
        # a server that cannot join a group is at fault, unless its source or another server failed
        at_fault = fenced if kind is GroupJoined else failed
        replies: dict[str, M] = {}
        waiting = set(names)
        while waiting := waiting - fenced.keys():
            try:
                # wait_for of Python 3.11 ignores a cancellation that comes together with a message
                async with asyncio.timeout(self._deadline - time.monotonic()):
                    name, message = await self.inbox.get()
            except TimeoutError:
                for server in waiting - self._sources:
                    fenced[server] = (
                        f"no {kind.__name__} within weights.update_timeout_s = {self.timeout_s:.0f}"
                    )
                break
            if isinstance(message, ServerLost):
                at_fault = failed
                if name in stop_with:
                    await self._stop_sources(waiting)
                continue
            if any(getattr(message, key, value) != value for key, value in match.items()):
                continue  # of an earlier update or group
            if name in fenced or name not in self._sources | self._servers:
                continue
            error = getattr(message, "error", "")
            if error and name in self._sources:
                at_fault = failed
            if error and name not in self._sources:
                at_fault[name] = error
                waiting.discard(name)
                if name in stop_with:
                    await self._stop_sources(waiting)
            elif name in waiting and isinstance(message, kind):
                replies[name] = message
                waiting.discard(name)
        # a server may be lost after its reply
        return {name: reply for name, reply in replies.items() if name not in fenced}

    async def _stop_sources(self, waiting: set[str]) -> None:
        for source in sorted(waiting & self._sources):
            await self.send(source, AbandonUpdate(self.outcome.version))


class RelabelPublisher:
    """Publishes without a trainer: servers keep their weights, which count as the next version.

        recorder                     controller                     rollout workers
        PublishOffer(version) ----->
                                     Relabel(version)  ---------->  new tokens get this version
                           <-------  Published      <-------------  Updated

    Requests are not interrupted: tokens generated before keep their version (SGLang >= 0.5.18;
    earlier, all tokens of a request have the version at its end).
    """

    def __init__(self, session: UpdateSession) -> None:
        self.session = session

    def start_epoch(self, epoch: int) -> None:
        """Does nothing: there are no update groups."""

    def forget_worker(self, name: str) -> None:
        """Does nothing: there are no update groups."""

    async def publish(
        self, version: int, offers: dict[str, PublishOffer], servers: list[str]
    ) -> Outcome:
        with self.session.update(version, offers, servers) as outcome:
            await self.session.begin(servers, Relabel(version))
            updated = await self.session.collect(Updated, servers, version=version)
            outcome.serving = sorted(updated)
        outcome.add(updated.values())
        return await self.session.end()

    async def finish(self) -> None:
        """Does nothing: an update has ended once the servers serve."""
