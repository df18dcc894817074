"""The messages of one weight update between the controller, the sources and the servers, whichever way the weights go.

    with exchange.update(version, sources, servers) as outcome:    its parties; what an earlier one left does not count
        exchange.start_clock()                                     every wait until the next start has this one deadline
        await exchange.send(name, ...)                             what a step asks
        answers = await exchange.collect(Kind, names, ...)         what it is answered
    await exchange.release(version, sources)                       the trainer goes on

A server that answers with an error, too late, or whose process is lost meanwhile, is fenced for this update: it is not
waited for, it gets nothing more, and what it still says is not heard. Used by publisher.py, folders.py and relabel.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_async_rl.controller.core.actions import ServerLost
from megatron_async_rl.protocol.messages import GroupJoined, Message, Published

M = TypeVar("M", bound=Message)


@dataclass
class Outcome:
    """What an update came to."""

    version: int
    serving: list[str]
    fenced: dict[str, str] = field(default_factory=dict)  # server -> why
    seconds: dict[str, float] = field(default_factory=dict)  # phase -> seconds of the slowest party
    num_interrupted: int = 0
    peak_bytes: int = 0  # GPU memory of the source that took most, beside its model

    def keep_slowest(self, seconds: dict[str, float]) -> None:
        for phase, value in seconds.items():
            self.seconds[phase] = max(self.seconds.get(phase, 0.0), value)


class UpdateSession:
    """One update at a time. `deliver` is the controller's, and the controller fills `inbox`; names address workers."""

    def __init__(
        self, deliver: Callable[[str, Message], Awaitable[None]], timeout_s: float
    ) -> None:
        self.inbox: asyncio.Queue[tuple[str, Message | ServerLost]] = asyncio.Queue()
        self.outcome = Outcome(-1, [])  # of the last update, also of one that failed
        self.timeout_s = timeout_s
        self._deliver = deliver
        self._deadline = 0.0
        self._sources: frozenset[str] = frozenset()
        self._servers: frozenset[str] = frozenset()  # of the update under way

    @contextmanager
    def update(
        self, version: int, sources: Collection[str], servers: Collection[str]
    ) -> Iterator[Outcome]:
        self._sources, self._servers = frozenset(sources), frozenset(servers)
        self.outcome = Outcome(version, [])
        self.start_clock()
        try:
            yield self.outcome
        finally:
            self._servers = frozenset()

    def start_clock(self) -> None:
        self._deadline = time.monotonic() + self.timeout_s

    def lost(self, name: str) -> None:
        """The server's process is gone. Nothing, unless the update under way has it: its next life is another matter."""
        if name in self._servers and name not in self.outcome.fenced:
            self.outcome.fenced[name] = (
                "lost in the middle of the update: its process failed, was silent or was replaced"
            )
            self.inbox.put_nowait((name, ServerLost(name)))  # wakes who waits for it

    async def send(self, name: str, message: Message) -> None:
        """Nothing to a server that is fenced: the name may be that of its next life."""
        if name not in self.outcome.fenced:
            await self._deliver(name, message)

    async def release(self, version: int, sources: Collection[str]) -> None:
        """The sources' part is done."""
        for source in sources:
            await self.send(source, Published(version, len(self.outcome.serving)))

    async def collect(
        self,
        kind: type[M],
        names: Collection[str],
        failed: dict[str, str] | None = None,
        **match: Any,
    ) -> dict[str, M]:
        """The answers of that kind and for that version or group, by name, until the deadline.

        A server that answers not at all or is lost is fenced and left out, and one that answers with an error too, unless
        the caller gives `failed` for its error. A source's error is for the caller.
        """
        fenced = self.outcome.fenced
        failed = fenced if failed is None else failed
        # who cannot join a group is at fault, unless its source gave up first or another server was lost
        at_fault = fenced if kind is GroupJoined else failed
        answers: dict[str, M] = {}
        waiting = set(names)
        while waiting := waiting - fenced.keys():
            try:
                name, message = await asyncio.wait_for(
                    self.inbox.get(), self._deadline - time.monotonic()
                )
            except TimeoutError:
                for server in waiting - self._sources:
                    fenced[server] = (
                        f"no {kind.__name__} within weights.update_timeout_s = {self.timeout_s:.0f}"
                    )
                break
            if isinstance(message, ServerLost):
                at_fault = failed
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
            elif name in waiting and isinstance(message, kind):
                answers[name] = message
                waiting.discard(name)
        return {
            name: answer for name, answer in answers.items() if name not in fenced
        }  # one may be lost after it
