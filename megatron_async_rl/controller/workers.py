"""Connected workers: names to sockets. Their state is in core/fleet.py."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.monitoring.timeline import Timeline
from megatron_async_rl.errors import Error
from megatron_async_rl.protocol.hub import Hub, Peer
from megatron_async_rl.protocol.messages import Hello, Message, Shutdown

logger = logging.getLogger(__name__)
MAX_REFUSED = 1024  # sockets remembered as refused
MAX_WORKERS = 4096  # names


@dataclass(frozen=True)
class Worker:
    """One incarnation of a worker: its socket and its Hello."""

    name: str
    peer: Peer
    hello: Hello


class Workers:
    """The newest incarnation of every worker that has joined."""

    def __init__(self, hub: Hub, timeline: Timeline) -> None:
        self.hub = hub
        self.timeline = timeline
        self.ending: Shutdown | None = None  # after SIGTERM: the order to all workers
        self._by_name: dict[str, Worker] = {}
        self._names: dict[Peer, str] = {}
        self._refused: dict[Peer, str] = {}  # socket -> why its process must end
        self._joined = asyncio.Event()

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)

    def __getitem__(self, name: str) -> Worker:
        return self._by_name[name]

    def join(self, peer: Peer, hello: Hello) -> bool:
        """Registers a worker; returns whether it replaces an earlier incarnation."""
        before = self._by_name.get(hello.name)
        if before and before.peer != peer:
            # the earlier process must end, or the two would take the name from each other
            taken_over = f"its name was taken over: {hello.name} is process {hello.pid} now"
            self.refuse(before.peer, taken_over)
        self._by_name[hello.name] = Worker(hello.name, peer, hello)
        self._names[peer] = hello.name
        self._joined.set()
        return before is not None

    def conflict(self, hello: Hello) -> str:
        """Returns why one more worker such as this cannot join; empty if it can."""
        if hello.name not in self._by_name and len(self._by_name) >= MAX_WORKERS:
            return f"{hello.name}: {MAX_WORKERS} workers have joined, which is the limit"
        for worker in self.leaders if hello.leader >= 0 else []:
            if worker.hello.leader == hello.leader and worker.name != hello.name:
                return f"{hello.name} joined as leader {hello.leader}, which is {worker.name}"
        return ""

    def refuse(self, peer: Peer, reason: str) -> None:
        """Ends the connection: the socket gets nothing but `reason` from now on."""
        self._names.pop(peer, None)
        self._refused.setdefault(peer, reason)
        for old in list(self._refused)[:-MAX_REFUSED]:
            del self._refused[old]

    def refused(self, peer: Peer) -> str:
        """Returns why this socket was refused; empty if it was not."""
        return self._refused.get(peer, "")

    def name_of(self, peer: Peer) -> str | None:
        """Returns None for a socket that has not sent Hello since this controller started."""
        return self._names.get(peer)

    @property
    def leaders(self) -> list[Worker]:
        """The leaders of the trainer's data-parallel replicas."""
        return [worker for worker in self._connected() if worker.hello.leader >= 0]

    async def send(self, name: str, message: Message) -> None:
        self.timeline.sent(name, message)
        worker = self._by_name.get(name)
        reachable = worker is not None and worker.peer not in self._refused
        if worker is None or not reachable or not await self.hub.send(worker.peer, message):
            logger.warning("%s is not connected; %s not delivered", name, type(message).__name__)

    def one_more(self) -> Coroutine[Any, Any, Any]:
        """Returns an awaitable that ends when a worker joins after this call."""
        self._joined.clear()  # here and not in a coroutine, which would start later
        return self._joined.wait()

    def wake(self) -> None:
        """Ends the waits of `one_more`: a server that was held for an evaluation is free."""
        self._joined.set()

    async def wait_for_all(self, config: Config, say: Callable[[str], None]) -> None:
        """Waits for all configured workers. Raises Error with the names of the missing ones."""
        limit_s = max(config.rollout.start_timeout_s, config.trainer.start_timeout_s)
        deadline = time.monotonic() + limit_s
        while missing := ", ".join(sorted(self._missing(config))):
            say(f"waiting for {missing}")
            try:
                await asyncio.wait_for(self.one_more(), deadline - time.monotonic())
            except TimeoutError:
                raise Error(f"{missing} did not start within {limit_s:.0f} s; see logs/") from None

    def _missing(self, config: Config) -> set[str]:
        stages = config.parallel_size("pipeline_model") if config.has_trainer else 1
        expected = {
            *(f"rollout-{i}" for i in range(config.rollout.servers)),
            *(f"reward-{i}" for i in range(config.reward.workers)),
            *(f"trainer stage {stage}" for stage in range(stages)),
            *(f"trainer leader {replica}" for replica in range(config.num_leaders)),
        }
        connected = {
            *(worker.name for worker in self._connected()),
            *(f"trainer stage {worker.hello.stage}" for worker in self._connected()),
            *(f"trainer leader {worker.hello.leader}" for worker in self._connected()),
        }
        return expected - connected

    def _connected(self) -> list[Worker]:
        return [worker for worker in self if worker.peer not in self._refused]
