"""Lets a server that joined late, restarted or fell behind load the newest snapshot by itself.

It gets no work until every tensor in the engine matches the digest that the trainer computed when
it wrote the snapshot. The trainer is not involved; without a snapshot that is new enough, the
server waits for the next update.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from contextlib import AbstractContextManager
from functools import partial

from megatron_async_rl.controller.context import Context
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.fleet import RolloutWorker
from megatron_async_rl.controller.weight_sync.snapshot import SnapshotStore
from megatron_async_rl.protocol.messages import Message
from megatron_async_rl.protocol.weight_messages import LoadSnapshot, Updated
from megatron_async_rl.storage.snapshots import Snapshot

logger = logging.getLogger(__name__)


class CatchUp:
    def __init__(self, context: Context, store: SnapshotStore) -> None:
        self._core = context.core
        self._queue = context.queue
        self._workers = context.workers
        self._store = store
        self._timeout_s = context.config.weights.update_timeout_s
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._replies: dict[str, asyncio.Queue[Updated]] = {}
        self.wanted: Snapshot | None = None  # for one server without weights: an evaluation's

    def is_busy(self, name: str | None = None) -> bool:
        """Returns whether this server, or any, is catching up."""
        return name in self._busy if name else bool(self._busy)

    def snapshot_of(self, version: int) -> Snapshot | None:
        return self._store.newest(version, version)

    def keeping(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        """Keeps the snapshot from being pruned."""
        return self._store.reading(snapshot)

    def start(self, others: Collection[str]) -> None:
        """Starts every server, except `others`, that is behind the newest usable snapshot.

        One held for an evaluation stays behind; one without weights may load that of an evaluation.
        """
        version = self._core.version
        newest = self._store.newest(version - self._core.settings.max_staleness, version)
        for server in self._core.fleet.rollout.values():
            unavailable = server.is_fenced or server.is_held or self.is_busy(server.name)
            if unavailable or server.name in others:
                continue
            if self.wanted and not server.is_serving:
                self._begin(server, self.wanted)
                self.wanted = None
            elif newest and (not server.is_serving or server.version < newest.version):
                self._begin(server, newest)

    def _begin(self, server: RolloutWorker, snapshot: Snapshot) -> None:
        self._replies[server.name] = asyncio.Queue()
        task = asyncio.create_task(self._load(server.name, server.incarnation, snapshot))
        self._busy[server.name] = task
        task.add_done_callback(partial(self._ended, server.name))

    async def one_done(self) -> None:
        """Returns when one of the busy servers is done; at once if there is none."""
        if self._busy:
            await asyncio.wait(self._busy.values(), return_when=asyncio.FIRST_COMPLETED)

    def replied(self, name: str, message: Message) -> bool:
        """Takes a reply; returns False if it belongs to something else."""
        if not isinstance(message, Updated) or not self.is_busy(name):
            return False
        self._replies[name].put_nowait(message)
        return True

    def forget(self, name: str) -> None:
        """Stops for a server that is lost."""
        if task := self._busy.pop(name, None):
            task.cancel()

    async def _load(self, name: str, incarnation: int, snapshot: Snapshot) -> None:
        version, started = snapshot.version, time.monotonic()
        await self._queue.submit(inputs.UpdateStarted(name, incarnation))
        with self._store.reading(snapshot):
            await self._workers.send(name, LoadSnapshot(version, str(snapshot.path)))
            error = await self._error(name, version)
        damage = await self._store.discard_if_damaged(snapshot) if error else ""
        if damage:  # not the server's fault: it gets another snapshot or an update
            event: inputs.CoreEvent = inputs.UpdateFailed(name, incarnation)
        elif error:
            event = inputs.ServerFenced(name, incarnation, reason=error)
        else:
            event = inputs.ServerUpdated(name, incarnation, version=version)
            logger.info(
                "%s has caught up with version %d from %s in %.2f s",
                name, version, snapshot.path, time.monotonic() - started,
            )  # fmt: skip
        await self._queue.submit(event)

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        """After an error the server can be started again, or be given an update."""
        if self._busy.get(name) is task:  # `forget` has not removed it
            del self._busy[name]
        if not task.cancelled() and (error := task.exception()):
            logger.error("catching up: %s: %s", type(error).__name__, error)

    async def _error(self, name: str, version: int) -> str:
        """Returns the server's error, or an empty string if it serves the version."""
        try:
            async with asyncio.timeout(self._timeout_s):
                while (reply := await self._replies[name].get()).version != version:
                    pass
                return reply.error
        except TimeoutError:
            return (
                f"did not load the snapshot of version {version} within "
                f"weights.update_timeout_s = {self._timeout_s:.0f}"
            )
