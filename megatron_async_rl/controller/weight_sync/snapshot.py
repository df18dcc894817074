"""Weights through the file system: sources write a folder, the controller completes it, servers
load it (storage/snapshots.py):

    weight sources                      controller                    rollout workers
    PublishOffer(version) ----------->
                  <----- WriteSnapshot  begin
    files ............
    SnapshotWritten(files, digests) ->  commit: manifest, rename
                  <--------- Published  the trainer continues
                                        LoadSnapshot  ------------->  verify files; abort, load,
                                                <---------- Updated   compare digests, resume
                                                                      (mismatch: fenced)

Requests are interrupted only while the engine loads. With weights.transport = network a snapshot is
written after the broadcast at every weights.snapshot_every-th version, for servers that join later
(catch_up.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.weight_sync.broadcast import BroadcastPublisher
from megatron_async_rl.controller.weight_sync.session import Outcome, UpdateSession
from megatron_async_rl.errors import DataError, PublishError
from megatron_async_rl.model.engine.block_fp8 import quantization_config
from megatron_async_rl.protocol.weight_messages import (
    LoadSnapshot,
    PublishOffer,
    SnapshotWritten,
    Updated,
    WriteSnapshot,
)
from megatron_async_rl.storage import snapshots
from megatron_async_rl.storage.snapshots import Snapshot, SnapshotManifest

logger = logging.getLogger(__name__)


class SnapshotStore:
    """The snapshots of this run with digests for its engines, and which of them are being read."""

    def __init__(self, config: Config) -> None:
        self._run_dir = config.run_dir.resolve()
        self._model_path = Path(config.model.path)
        self._engine_tp = config.engine_tp
        self._in_use: Counter[Path] = Counter()
        self._quantization_config = quantization_config(config)
        kind = snapshots.digest_kind(config)
        own = SnapshotManifest(0, {}, self._engine_tp, kind, {}, self._quantization_config)
        self._complete = [
            found
            for found in snapshots.list_snapshots(self._run_dir)
            if msgspec.structs.replace(found.manifest, version=0, files={}, digests={}) == own
        ]

    def newest(self, at_least: int, at_most: int) -> Snapshot | None:
        return next((s for s in self._complete if at_least <= s.version <= at_most), None)

    @contextmanager
    def reading(self, snapshot: Snapshot) -> Iterator[None]:
        """Keeps the snapshot from being pruned."""
        self._in_use[snapshot.path] += 1
        try:
            yield
        finally:
            self._in_use[snapshot.path] -= 1

    async def begin(self, version: int) -> Path:
        return await asyncio.to_thread(snapshots.begin, self._run_dir, version)

    async def commit(self, partial: Path, version: int, written: list[SnapshotWritten]) -> Snapshot:
        """Completes the folder and prunes older ones. Raises DataError or OSError."""
        digests = {name: digest for part in written for name, digest in part.digests.items()}
        kind = written[0].digest_kind
        manifest = SnapshotManifest(
            version, {}, self._engine_tp, kind, digests, self._quantization_config
        )
        files = [entry for part in written for entry in part.files]
        snapshot = await asyncio.to_thread(
            snapshots.commit, partial, files, manifest, self._model_path
        )
        in_use = {path for path, count in self._in_use.items() if count}
        await asyncio.to_thread(snapshots.prune, self._run_dir, in_use)
        self._complete = [snapshot, *(s for s in self._complete if s.path.exists())]
        return snapshot

    async def discard_if_damaged(self, snapshot: Snapshot) -> str:
        """Removes the snapshot if its files are damaged; returns the damage or an empty string."""
        damage = await asyncio.to_thread(snapshots.find_damage, snapshot)
        if damage:
            logger.error("%s is damaged and removed: %s", snapshot.path, damage)
            self._complete = [found for found in self._complete if found != snapshot]
            await asyncio.to_thread(snapshots.remove, snapshot.path)
        return damage


class TrainerPublisher:
    """Publishes the trainer's weights by disk, or by network and then to disk for later servers."""

    def __init__(self, session: UpdateSession, config: Config, store: SnapshotStore) -> None:
        self.session = session
        self._network = BroadcastPublisher(session, config.engine_tp, config.weights.verify_every)
        self._store = store
        self._by_disk = config.weights.transport == "disk"
        self._every = config.weights.snapshot_every
        self._held: list[str] = []  # sources that are not released yet

    def start_epoch(self, epoch: int) -> None:
        self._network.start_epoch(epoch)

    def forget_worker(self, name: str) -> None:
        """Drops the update groups that contain an earlier incarnation of this worker."""
        self._network.forget_worker(name)

    def forget_groups(self) -> None:
        self._network.forget_groups()

    async def publish(
        self, version: int, offers: dict[str, PublishOffer], servers: list[str]
    ) -> Outcome:
        """Updates `servers` to `version` with the offers by source name.

        Raises PublishError if no server took it.
        """
        self._held = []
        sources = sorted(offers, key=lambda name: offers[name].source)
        if self._by_disk:
            return await self._publish_by_disk(version, sources, servers)
        hold = bool(self._every) and version % self._every == 0
        outcome = await self._network.publish(version, offers, servers, hold)
        self._held = sources if hold else []  # until `finish`: servers need not wait for it
        return outcome

    async def _publish_by_disk(
        self, version: int, sources: list[str], servers: list[str]
    ) -> Outcome:
        session = self.session
        with session.update(version, sources, servers) as outcome:
            try:
                snapshot = await self._write(sources)
            except PublishError:
                await session.release()
                raise
            await session.release()
            session.start_clock()
            with self._store.reading(snapshot):
                await session.begin(servers, LoadSnapshot(version, str(snapshot.path)))
                updated = await session.collect(Updated, servers, version=version)
            outcome.serving = sorted(updated)
        outcome.add(updated.values())
        if outcome.fenced:
            await self._store.discard_if_damaged(snapshot)
        return await session.end(release=False)

    async def finish(self) -> None:
        """Writes the snapshot of an update over the network, if one is due; only logs a failure."""
        sources, self._held = self._held, []
        if not sources:
            return
        try:
            await self._write(sources)
        except PublishError as e:
            logger.error("%s; the run continues without it", e)
        await self.session.release()

    async def _write(self, sources: list[str]) -> Snapshot:
        """Raises PublishError if the snapshot cannot be completed; earlier ones stay."""
        session, outcome, started = self.session, self.session.outcome, time.monotonic()
        version = outcome.version
        session.start_clock()
        try:
            partial = await self._store.begin(version)
            for part, source in enumerate(sources):
                await session.send(source, WriteSnapshot(version, str(partial), part))
            written = await session.collect(SnapshotWritten, sources, version=version)
            errors = [f"{source} did not reply" for source in sources if source not in written]
            errors += [reply.error for reply in written.values() if reply.error]
            if errors:
                raise DataError("; ".join(errors))
            parts = [written[source] for source in sources]
            snapshot = await self._store.commit(partial, version, parts)
        except (OSError, DataError) as e:
            raise PublishError(f"the snapshot of version {version} was not written: {e}") from None
        outcome.add(written.values())
        seconds = outcome.seconds["snapshot"] = time.monotonic() - started
        logger.info("version %d is in %s after %.2f s", version, snapshot.path, seconds)
        return snapshot
