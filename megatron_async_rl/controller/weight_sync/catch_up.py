"""A server that comes late, comes back, or fell behind takes the newest folder in by itself while the others go on.

It gets no work before every tensor that its engine holds digests to what the trainer worked out when it wrote the
folder. The trainer is not asked for anything; where there is no folder that is new enough, the server waits for the
next update over the network instead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection

from megatron_async_rl.controller.core.actions import Action
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.fleet import RolloutWorker, ServerState
from megatron_async_rl.controller.weight_sync.snapshot import SnapshotStore
from megatron_async_rl.controller.workers import Workers
from megatron_async_rl.protocol.messages import LoadSnapshot, Message, Shutdown, Updated
from megatron_async_rl.storage.snapshots import Snapshot

logger = logging.getLogger(__name__)


class CatchUp:
    def __init__(
        self,
        core: Core,
        workers: Workers,
        folders: SnapshotStore,
        timeout_s: float,
        act: Callable[[list[Action]], Awaitable[None]],
    ) -> None:
        self._core = core
        self._workers = workers
        self._folders = folders
        self._timeout_s = timeout_s
        self._act = act
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._answers: dict[str, asyncio.Queue[Updated]] = {}

    def is_busy(self, name: str | None = None) -> bool:
        """Whether this server, or any, is catching up."""
        return name in self._busy if name else bool(self._busy)

    def start(self, others: Collection[str]) -> None:
        """Begins for every server, but the `others`, that lacks weights which a folder has, new enough for `eta`."""
        newest = self._folders.newest(
            self._core.version - self._core.rules.max_staleness, self._core.version
        )
        if newest is None:
            return
        for server in self._core.fleet.rollout.values():
            behind = server.state is not ServerState.SERVING or server.version < newest.version
            if (
                behind
                and not server.reason
                and server.name not in others
                and not self.is_busy(server.name)
            ):
                self._core.updating(server.name)
                self._answers[server.name] = asyncio.Queue()
                task = self._busy[server.name] = asyncio.create_task(self._bring(server, newest))
                task.add_done_callback(_log_error)

    async def one_done(self) -> None:
        """Returns when a server that is busy is so no more; at once when none is."""
        if self._busy:
            await asyncio.wait(self._busy.values(), return_when=asyncio.FIRST_COMPLETED)

    def hear(self, name: str, message: Message) -> bool:
        """Whether the message was an answer to this."""
        if not isinstance(message, Updated) or not self.is_busy(name):
            return False
        self._answers[name].put_nowait(message)
        return True

    def forget(self, name: str) -> None:
        """The server is lost, or a new life of it is there: what the old one was doing came to nothing."""
        if task := self._busy.pop(name, None):
            task.cancel()

    async def fence(self, server: RolloutWorker, reason: str) -> None:
        """Its process ends; a new life of it starts clean. Nothing, when that has begun already."""
        name = server.name
        logger.error("%s is fenced: %s", name, reason)
        if self._core.fleet.rollout.get(name) is server:
            await self._act(self._core.fenced(name, reason, time.monotonic()))
            await self._workers.send(name, Shutdown(f"fenced: {reason}"))

    async def _bring(self, server: RolloutWorker, snapshot: Snapshot) -> None:
        name, version, started = server.name, snapshot.version, time.monotonic()
        with self._folders.reading(snapshot):
            await self._workers.send(name, LoadSnapshot(version, str(snapshot.path)))
            error = await self._answer(name, version)
        damage = await self._folders.discard_if_damaged(snapshot) if error else ""
        del self._busy[name]
        if self._core.fleet.rollout.get(name) is not server:
            return
        if not error:
            seconds = time.monotonic() - started
            logger.info(
                "%s has caught up with version %d from %s in %.2f s",
                name,
                version,
                snapshot.path,
                seconds,
            )
            await self._act(self._core.serving(name, version, time.monotonic()))
        elif damage:
            server.state = ServerState.STALE  # not its fault: another folder, or an update
        else:
            await self.fence(server, error)

    async def _answer(self, name: str, version: int) -> str:
        """The server's error; empty: it serves."""
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    answer = await self._answers[name].get()
                    if answer.version == version:
                        return answer.error
        except TimeoutError:
            return f"did not take version {version} from the disk within weights.update_timeout_s = {self._timeout_s:.0f}"


def _log_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.error("catching up: %s: %s", type(error).__name__, error)
