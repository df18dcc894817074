"""Weights by way of the disk: the sources write a folder, the controller makes it whole, servers load it (snapshots.py).

    weight sources (weights/reshard.py)          controller                     rollout workers
    PublishOffer(version) -------------------->
                       <--------- WriteFolder    begin
    files ............
    FolderWritten(files, digests) ------------>  commit: manifest, rename
                       <--------- Published      the trainer goes on
                                                 LoadFolder  ---------------->  verify files; abort, load, digest,
                                                             <--------- Updated  compare, resume (mismatch: fenced)

Requests are interrupted only for the loading. With `transport: network` the folder is written after the broadcast, at
every `folder_every`-th version, for servers that come later (catch_up.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_async_rl import snapshots
from megatron_async_rl.config import Config
from megatron_async_rl.controller.publisher import Outcome, Publisher, keep_slowest
from megatron_async_rl.errors import DataError, PublishError
from megatron_async_rl.messages import FolderWritten, LoadFolder, Message, PublishOffer, Updated, WriteFolder
from megatron_async_rl.snapshots import Manifest, Snapshot

logger = logging.getLogger(__name__)


class Folders:
    """The snapshots of this run that its engines can be held against, and who reads them."""

    def __init__(self, config: Config) -> None:
        self._run_dir = config.run_dir.resolve()
        self._model_path = Path(config.model.path)
        self._engine_tp = int(config.sglang.get("tp_size", 1))
        self._in_use: Counter[Path] = Counter()
        kind = snapshots.digest_kind(config)
        self._whole = [
            found
            for found in snapshots.whole(self._run_dir)
            if (found.manifest.engine_tp, found.manifest.digest_kind) == (self._engine_tp, kind)
        ]

    def newest(self, at_least: int, at_most: int) -> Snapshot | None:
        return next((found for found in self._whole if at_least <= found.version <= at_most), None)

    @contextmanager
    def reading(self, snapshot: Snapshot) -> Iterator[None]:
        """It is not removed meanwhile."""
        self._in_use[snapshot.path] += 1
        try:
            yield
        finally:
            self._in_use[snapshot.path] -= 1

    async def begin(self, version: int) -> Path:
        return await asyncio.to_thread(snapshots.begin, self._run_dir, version)

    async def commit(self, partial: Path, version: int, written: list[FolderWritten]) -> Snapshot:
        """Raises DataError or OSError when the folder cannot be made whole."""
        digests = {name: digest for part in written for name, digest in part.digests.items()}
        manifest = Manifest(version, {}, self._engine_tp, written[0].digest_kind, digests)
        files = [entry for part in written for entry in part.files]
        snapshot = await asyncio.to_thread(snapshots.commit, partial, files, manifest, self._model_path)
        in_use = {path for path, count in self._in_use.items() if count}
        await asyncio.to_thread(snapshots.prune, self._run_dir, in_use)
        self._whole = [snapshot, *(found for found in self._whole if found.path.exists())]
        return snapshot

    async def discard_if_damaged(self, snapshot: Snapshot) -> str:
        """What is wrong with its files, if anything; it is then gone."""
        damage = await asyncio.to_thread(snapshots.damage, snapshot)
        if damage:
            logger.error("%s is damaged and removed: %s", snapshot.path, damage)
            self._whole = [found for found in self._whole if found != snapshot]
            await asyncio.to_thread(snapshots.remove, snapshot.path)
        return damage


class FolderPublisher(Publisher):
    """A publisher that writes folders: instead of sending buckets, or after it."""

    def __init__(self, send: Callable[[str, Message], Awaitable[None]], config: Config, folders: Folders) -> None:
        weights = config.weights
        super().__init__(send, int(config.sglang.get("tp_size", 1)), weights.update_timeout_s, weights.verify_every)
        self._folders = folders
        self._over_disk = weights.transport == "disk"
        self._every = weights.folder_every
        self._held: list[str] = []  # sources that are not released yet

    async def publish(
        self, version: int, offers: dict[str, PublishOffer], servers: list[str], updating: Callable[[str], None]
    ) -> Outcome:
        self._held = []
        if not self._over_disk:
            return await super().publish(version, offers, servers, updating)
        sources = sorted(offers, key=lambda name: offers[name].source)
        self._sources = frozenset(sources)
        outcome = self.outcome = Outcome(version, [])
        started = time.monotonic()
        try:
            snapshot = await self._write(version, sources, outcome)
        except PublishError:
            await super()._release(version, sources, outcome)
            raise
        await super()._release(version, sources, outcome)
        self._deadline = time.monotonic() + self._timeout_s
        with self._folders.reading(snapshot):
            for server in servers:
                updating(server)
                await self._send(server, LoadFolder(version, str(snapshot.path)))
            updated = await self._collect(Updated, servers, outcome, version=version)
        for message in updated.values():
            keep_slowest(outcome.seconds, message.seconds)
            outcome.num_interrupted += message.num_interrupted
        outcome.serving = sorted(updated)
        outcome.seconds["total"] = time.monotonic() - started
        if outcome.fenced:
            await self._folders.discard_if_damaged(snapshot)
        if not outcome.serving:
            raise PublishError(f"no server took version {version}: {outcome.fenced}")
        return outcome

    async def _release(self, version: int, sources: list[str], outcome: Outcome) -> None:
        if self._every and version % self._every == 0 and outcome.serving:
            self._held = sources  # until `afterwards`: the servers need not wait for it
        else:
            await super()._release(version, sources, outcome)

    async def afterwards(self) -> None:
        """What is left to do of an update when its servers serve. A folder that fails is an error in the log alone."""
        sources, self._held = self._held, []
        if not sources:
            return
        version = self.outcome.version
        try:
            await self._write(version, sources, self.outcome)
        except PublishError as e:
            logger.error("%s; the run goes on without it", e)
        await super()._release(version, sources, self.outcome)

    async def _write(self, version: int, sources: list[str], outcome: Outcome) -> Snapshot:
        """Raises PublishError when the folder did not become whole; earlier ones stay."""
        started = time.monotonic()
        self._deadline = started + self._timeout_s
        try:
            partial = await self._folders.begin(version)
            for part, source in enumerate(sources):
                await self._send(source, WriteFolder(version, str(partial), part))
            written = await self._collect(FolderWritten, sources, outcome, version=version)
            late = [f"{source} did not answer" for source in sources if source not in written]
            if errors := late + [message.error for message in written.values() if message.error]:
                raise PublishError(f"the folder of version {version} was not written: {'; '.join(errors)}")
            snapshot = await self._folders.commit(partial, version, [written[source] for source in sources])
        except (OSError, DataError) as e:
            raise PublishError(f"the folder of version {version} was not written: {e}") from None
        for message in written.values():
            keep_slowest(outcome.seconds, message.seconds)
        outcome.seconds["folder"] = time.monotonic() - started
        logger.info("version %d lies in %s after %.2f s", version, snapshot.path, outcome.seconds["folder"])
        return snapshot
