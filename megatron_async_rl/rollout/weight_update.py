"""A weight update, seen from a server (controller/publisher.py draws the whole exchange):

UpdateWeights    new requests wait at the gate; running ones are stopped (interruption.py says how)
ReceiveBuckets   begin, bucket after bucket, end; with `recompute` the prefix cache is dropped: nothing of the old
                 weights is left
WeightDigests    the engine's digests against the trainer's; equal: requests go on and the gate opens. Anything else:
                 `Updated` with an error, and the gate stays shut

Or by way of the disk: LoadFolder, which has its digests in the folder. Requests go on until its files are verified.
Without a trainer (run.mode = rollout_only) there is Relabel alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import EngineError
from megatron_async_rl.protocol.messages import (
    AbandonUpdate,
    AnyMessage,
    GroupJoined,
    JoinGroup,
    LoadSnapshot,
    ReceiveBuckets,
    Relabel,
    Updated,
    UpdateReady,
    UpdateWeights,
    WeightDigests,
)
from megatron_async_rl.protocol.transport import Link
from megatron_async_rl.rollout.engine_client import EngineClient
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.interruption import interruption
from megatron_async_rl.storage import snapshots
from megatron_async_rl.storage.snapshots import Snapshot

logger = logging.getLogger(__name__)
IDLE_AFTER = (
    3  # calls to the engine: one that nobody waits for any more has left its batches by then
)
FLUSH_PATIENCE_S = 5.0


class WeightUpdates:
    """Takes updates in, one at a time, and opens the gate after each that is as it must be."""

    def __init__(
        self,
        config: Config,
        link: Link,
        client: EngineClient,
        gate: Gate,
        started_from: Path | None = None,
    ) -> None:
        self.version = -1  # of the weights, when last verified
        self.interruption = interruption(config, client, gate)
        self._config = config
        self._link = link
        self._client = client
        self._gate = gate
        self._holds = (
            started_from  # a snapshot's folder that the engine has loaded, not yet verified
        )
        self._groups: list[str] = []
        self._digests: asyncio.Queue[WeightDigests | AbandonUpdate] = asyncio.Queue()
        self._seconds: dict[str, float] = {}
        self._num_interrupted = 0
        self._paused_since = 0.0

    def hear(self, message: WeightDigests | AbandonUpdate) -> None:
        """Ends the wait of an update that has taken in all buckets."""
        self._digests.put_nowait(message)

    async def step(self, message: AnyMessage) -> None:
        """One step of an update; an error is reported, and the gate stays shut."""
        try:
            if isinstance(message, UpdateWeights):
                await self._interrupt(message.version)
            elif isinstance(message, JoinGroup):
                await self._join(message)
            elif isinstance(message, ReceiveBuckets):
                await self._take_in(message)
            elif isinstance(message, LoadSnapshot):
                await self._load(message)
            elif isinstance(message, Relabel):
                await self._relabel(message.version)
        except EngineError as e:
            logger.error("weight update: %s", e)
            if isinstance(message, JoinGroup):
                await self._link.send(GroupJoined(message.group, error=str(e)))
            else:
                await self._link.send(Updated(message.version, self._seconds, error=str(e)))

    async def _interrupt(self, version: int) -> None:
        await self._stop()
        await self._link.send(UpdateReady(version, self.interruption.seconds))

    async def _stop(self) -> None:
        self._paused_since = time.monotonic()
        self._gate.shut()
        self._num_interrupted = self._gate.num_out
        self._seconds = {}
        await self.interruption.stop()

    async def _join(self, join: JoinGroup) -> None:
        formation = join.group.rsplit("-", 1)[0]
        for old in [group for group in self._groups if group.rsplit("-", 1)[0] != formation]:
            self._groups.remove(old)
            await self._client.leave_group(old)
        await self._client.join_group(join)
        self._groups.append(join.group)
        await self._link.send(GroupJoined(join.group))

    async def _load(self, order: LoadSnapshot) -> None:
        started = time.monotonic()
        snapshot = await asyncio.to_thread(_verified, Path(order.folder))
        checked = time.monotonic()
        await self._stop()
        lap = self._laps()
        flushes, at_once = self.interruption.flushes, self.interruption.freezes
        if snapshot.path != self._holds:  # what the server was started from
            timeout_s = self._config.weights.update_timeout_s
            await self._client.load_folder(
                snapshot.path, order.version, flushes and at_once, timeout_s
            )
        self._holds = None
        await self.interruption.stopped()
        lap("load")
        if flushes and not at_once:
            await self._client.flush_cache(FLUSH_PATIENCE_S)
        lap("flush")
        compare(await self._held(order.version, True), snapshot.manifest.digests)
        lap("digest")
        self._seconds["check_files"] = checked - started
        await self._serve(order.version, lap)

    async def _relabel(self, version: int) -> None:
        """Nothing is interrupted: only the label changes."""
        lap = self._laps()
        self._seconds, self._num_interrupted = {}, 0
        await self._client.relabel(version)
        await self._held(version, False)
        lap("relabel")
        self.version = version
        self._gate.open()
        await self._link.send(Updated(version, self._seconds))

    def _laps(self) -> Callable[[str], None]:
        clock = time.monotonic()

        def lap(phase: str) -> None:
            nonlocal clock
            now = time.monotonic()
            self._seconds[phase], clock = now - clock, now

        return lap

    async def _take_in(self, update: ReceiveBuckets) -> None:
        lap = self._laps()
        self._holds = None
        await self._client.begin_update()
        try:
            await self._receive(update)
        except EngineError:
            with contextlib.suppress(EngineError):
                await self._client.end_update()  # another try begins anew
            raise
        await self._client.end_update()
        await self.interruption.stopped()
        lap("load")
        if self.interruption.flushes and not self._flushes_at_once(update):
            await self._client.flush_cache(FLUSH_PATIENCE_S)
        lap("flush")
        held = await self._held(update.version, update.verify)
        expected = await self._digests_of(update.version)
        if isinstance(expected, AbandonUpdate):
            await self._link.send(UpdateReady(update.version, {}))
            return
        if update.verify:
            compare(held, expected.digests)
        lap("digest")
        await self._serve(update.version, lap)

    async def _serve(self, version: int, lap: Callable[[str], None]) -> None:
        """The engine holds what it must."""
        await self.interruption.resume()
        self.version = version
        self._gate.open()
        self._seconds |= self.interruption.seconds
        lap("resume")
        self._seconds["pause"] = time.monotonic() - self._paused_since
        await self._link.send(
            Updated(version, self._seconds, num_interrupted=self._num_interrupted)
        )

    async def _receive(self, update: ReceiveBuckets) -> None:
        started = time.monotonic()
        buckets = [(stage.group, bucket) for stage in update.stages for bucket in stage.buckets]
        for number, (group, bucket) in enumerate(buckets, 1):
            is_last = number == len(buckets)
            await self._client.receive_bucket(
                group,
                bucket,
                update.flattened,
                version=update.version if is_last else None,
                flush=is_last and self.interruption.flushes and self._flushes_at_once(update),
            )
            if (
                number == 1
            ):  # of `load`: until the engine had ended what ran, and taken in the first
                self._seconds["first_bucket"] = time.monotonic() - started

    def _flushes_at_once(self, update: ReceiveBuckets) -> bool:
        """Whether the cache can be dropped with the last bucket: a call for it alone takes 10 to 30 ms on a GPU.

        The engine must be idle then, or it dies. It is when it is paused; else its last requests have been answered
        before the first bucket, and only an answer that nobody waited for can be under way for one or two batches more.
        """
        return (
            self.interruption.freezes
            or sum(len(stage.buckets) for stage in update.stages) >= IDLE_AFTER
        )

    async def _held(self, version: int, verify: bool) -> dict[str, str]:
        """The engine's digests, if they are to be compared. Raises EngineError when it names another version."""

        async def checksums() -> dict[str, str]:
            return await self._client.checksums() if verify else {}

        held, served = await asyncio.gather(checksums(), self._client.served_version())
        if served != str(version):
            raise EngineError(f"the engine says it holds version {served}, expected {version}")
        return held

    async def _digests_of(self, version: int) -> WeightDigests | AbandonUpdate:
        timeout_s = self._config.weights.update_timeout_s
        try:
            while True:
                message = await asyncio.wait_for(self._digests.get(), timeout_s)
                if message.version == version:
                    return message
        except TimeoutError:
            raise EngineError(
                f"the trainer's digests of version {version} did not come within {timeout_s:.0f} s"
            ) from None


def _verified(folder: Path) -> Snapshot:
    """Raises EngineError when its files are not what its manifest says."""
    snapshot = snapshots.read(folder)
    if snapshot is None:
        raise EngineError(f"{folder} has no manifest that can be read")
    if damage := snapshots.damage(snapshot):
        raise EngineError(damage)
    return snapshot


def compare(held: dict[str, str], expected: dict[str, str]) -> None:
    """Raises EngineError naming the first tensor whose digest differs, is missing or is one too many."""
    if not expected:
        raise EngineError("the trainer sent no digests, so nothing can be verified")
    for name in sorted(held.keys() | expected.keys()):
        if held.get(name) != expected.get(name):
            raise EngineError(
                f"tensor {name} in the engine digests to {held.get(name)}, the trainer's to {expected.get(name)}"
            )
