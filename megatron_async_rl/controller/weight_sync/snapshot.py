"""Weights by way of the disk: the sources write a folder, the controller makes it whole, servers load it (snapshots.py).

    weight sources (weights/reshard.py)          controller                     rollout workers
    PublishOffer(version) -------------------->
                       <--------- WriteFolder    begin
    files ............
    FolderWritten(files, digests) ------------>  commit: manifest, rename
                       <--------- Published      the trainer goes on
                                                 LoadFolder  ---------------->  verify files; abort, load, digest,
                                                             <--------- Updated  compare, resume (mismatch: fenced)

Requests are interrupted only for the loading. A server that is lost meanwhile is not waited for (exchange.py). With
`transport: network` the folder is written after the broadcast, at every `snapshot_every`-th version, for servers that come
later (catch_up.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.weight_sync.broadcast import BroadcastPublisher
from megatron_async_rl.controller.weight_sync.session import Outcome, UpdateSession
from megatron_async_rl.errors import DataError, PublishError
from megatron_async_rl.protocol.messages import (
    LoadSnapshot,
    PublishOffer,
    SnapshotWritten,
    Updated,
    WriteSnapshot,
)
from megatron_async_rl.storage import snapshots
from megatron_async_rl.storage.snapshots import SnapshotManifest, Snapshot

logger = logging.getLogger(__name__)


class SnapshotStore:
    """The snapshots of this run that its engines can be held against, and who reads them."""

    def __init__(self, config: Config) -> None:
        self._run_dir = config.run_dir.resolve()
        self._model_path = Path(config.model.path)
        self._engine_tp = config.engine_tp
        self._in_use: Counter[Path] = Counter()
        kind = snapshots.digest_kind(config)
        self._whole = [
            found
            for found in snapshots.list_snapshots(self._run_dir)
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

    async def commit(self, partial: Path, version: int, written: list[SnapshotWritten]) -> Snapshot:
        """Raises DataError or OSError when the folder cannot be made whole."""
        digests = {name: digest for part in written for name, digest in part.digests.items()}
        manifest = SnapshotManifest(version, {}, self._engine_tp, written[0].digest_kind, digests)
        files = [entry for part in written for entry in part.files]
        snapshot = await asyncio.to_thread(
            snapshots.commit, partial, files, manifest, self._model_path
        )
        in_use = {path for path, count in self._in_use.items() if count}
        await asyncio.to_thread(snapshots.prune, self._run_dir, in_use)
        self._whole = [snapshot, *(found for found in self._whole if found.path.exists())]
        return snapshot

    async def discard_if_damaged(self, snapshot: Snapshot) -> str:
        """What is wrong with its files, if anything; it is then gone."""
        damage = await asyncio.to_thread(snapshots.find_damage, snapshot)
        if damage:
            logger.error("%s is damaged and removed: %s", snapshot.path, damage)
            self._whole = [found for found in self._whole if found != snapshot]
            await asyncio.to_thread(snapshots.remove, snapshot.path)
        return damage


class TrainerPublisher:
    """What the controller publishes by where there is a trainer: over the disk, or over the network and then to the disk."""

    def __init__(self, exchange: UpdateSession, config: Config, folders: SnapshotStore) -> None:
        self.exchange = exchange
        self._network = BroadcastPublisher(
            exchange, config.engine_tp, config.weights.verify_every
        )
        self._folders = folders
        self._over_disk = config.weights.transport == "disk"
        self._every = config.weights.snapshot_every
        self._held: list[str] = []  # sources that are not released yet

    def start_generation(self, epoch: int) -> None:
        self._network.start_generation(epoch)

    def forget(self, name: str) -> None:
        """A new life of this worker."""
        self._network.forget(name)

    def forget_groups(self) -> None:
        self._network.forget_groups()

    async def publish(
        self,
        version: int,
        offers: dict[str, PublishOffer],
        servers: list[str],
        updating: Callable[[str], None],
    ) -> Outcome:
        """Brings `servers` to `version`. `offers` by source name. Raises PublishError when no server is left."""
        self._held = []
        sources = sorted(offers, key=lambda name: offers[name].source)
        if self._over_disk:
            return await self._by_the_disk(version, sources, servers, updating)
        hold = bool(self._every) and version % self._every == 0
        outcome = await self._network.publish(version, offers, servers, updating, hold)
        self._held = sources if hold else []  # until `afterwards`: the servers need not wait for it
        return outcome

    async def _by_the_disk(
        self, version: int, sources: list[str], servers: list[str], updating: Callable[[str], None]
    ) -> Outcome:
        exchange, started = self.exchange, time.monotonic()
        with exchange.update(version, sources, servers) as outcome:
            try:
                snapshot = await self._write(version, sources, outcome)
            except PublishError:
                await exchange.release(version, sources)
                raise
            await exchange.release(version, sources)
            exchange.start_clock()
            with self._folders.reading(snapshot):
                for server in servers:
                    if server not in outcome.fenced:  # lost while the folder was written
                        updating(server)
                        await exchange.send(server, LoadSnapshot(version, str(snapshot.path)))
                updated = await exchange.collect(Updated, servers, version=version)
            outcome.serving = sorted(updated)
        for message in updated.values():
            outcome.keep_slowest(message.seconds)
            outcome.num_interrupted += message.num_interrupted
        outcome.seconds["total"] = time.monotonic() - started
        if outcome.fenced:
            await self._folders.discard_if_damaged(snapshot)
        if not outcome.serving:
            raise PublishError(f"no server took version {version}: {outcome.fenced}")
        return outcome

    async def afterwards(self) -> None:
        """What is left to do of an update when its servers serve. A folder that fails is an error in the log alone."""
        sources, self._held = self._held, []
        if not sources:
            return
        outcome = self.exchange.outcome
        try:
            await self._write(outcome.version, sources, outcome)
        except PublishError as e:
            logger.error("%s; the run goes on without it", e)
        await self.exchange.release(outcome.version, sources)

    async def _write(self, version: int, sources: list[str], outcome: Outcome) -> Snapshot:
        """Raises PublishError when the folder did not become whole; earlier ones stay."""
        started = time.monotonic()
        self.exchange.start_clock()
        try:
            partial = await self._folders.begin(version)
            for part, source in enumerate(sources):
                await self.exchange.send(source, WriteSnapshot(version, str(partial), part))
            written = await self.exchange.collect(SnapshotWritten, sources, version=version)
            late = [f"{source} did not answer" for source in sources if source not in written]
            if errors := late + [message.error for message in written.values() if message.error]:
                raise PublishError(
                    f"the folder of version {version} was not written: {'; '.join(errors)}"
                )
            snapshot = await self._folders.commit(
                partial, version, [written[source] for source in sources]
            )
        except (OSError, DataError) as e:
            raise PublishError(f"the folder of version {version} was not written: {e}") from None
        for message in written.values():
            outcome.keep_slowest(message.seconds)
        outcome.seconds["folder"] = time.monotonic() - started
        logger.info(
            "version %d lies in %s after %.2f s", version, snapshot.path, outcome.seconds["folder"]
        )
        return snapshot
