"""Weight updates of one server (controller/weight_sync/broadcast.py draws the whole exchange):

UpdateWeights    close the gate; interrupt the requests in flight or let them end (interruption.py)
ReceiveBuckets   begin, receive bucket after bucket, end; with kv_cache recompute also flush the
                 prefix cache
WeightDigests    compare the server's digests with the trainer's; if equal, resume the requests and
                 open the gate, else answer `Updated` with an error and stay closed

LoadSnapshot replaces all of these: weights and digests come from a folder, and requests continue
until its files are verified. With run.mode = rollout_only there is only Relabel.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import EngineError
from megatron_async_rl.model.engine import engine_versions
from megatron_async_rl.protocol import weight_messages
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.rollout.engine_client import EngineClient
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.interruption import make_interruption
from megatron_async_rl.storage import snapshots
from megatron_async_rl.storage.snapshots import Snapshot

logger = logging.getLogger(__name__)
IDLE_AFTER = 3  # after this many engine calls no aborted request is left in the running batch
FLUSH_TIMEOUT_S = 5.0

UpdateStep = (
    weight_messages.UpdateWeights
    | weight_messages.JoinGroup
    | weight_messages.ReceiveBuckets
    | weight_messages.LoadSnapshot
    | weight_messages.Relabel
)
# of the controller, after the buckets
Verdict = weight_messages.WeightDigests | weight_messages.AbandonUpdate


class WeightUpdates:
    """Performs one update at a time; opens the gate after each one that was verified."""

    def __init__(
        self,
        config: Config,
        link: Link,
        client: EngineClient,
        gate: Gate,
        loaded_folder: Path | None = None,
    ) -> None:
        self.version = -1  # of the weights when last verified
        engine_versions.check(config, client.version)
        self.interruption = make_interruption(config, client, gate)
        self._timeout_s = config.weights.update_timeout_s
        self._link = link
        self._client = client
        self._gate = gate
        self._loaded_folder = (
            loaded_folder  # the snapshot the server started from, not yet verified
        )
        self._groups: list[str] = []
        self._receiving = -1  # the version of the newest step
        self._verdict: asyncio.Future[Verdict] | None = None  # on the newest step
        self._engine = asyncio.Lock()  # held by the step that changes the engine's weights
        self._seconds: dict[str, float] = {}
        self._num_interrupted = 0
        self._paused_since = self._phase_started = 0.0

    def cache_key(self) -> str | None:
        return self.interruption.cache_key()

    def deliver(self, message: Verdict) -> None:
        """Ends the wait of the newest step, when it has received all buckets."""
        if self._verdict and not self._verdict.done() and message.version == self._receiving:
            self._verdict.set_result(message)

    def handle(self, message: UpdateStep) -> Coroutine[Any, Any, None]:
        """Returns a coroutine that performs one step of an update; call it in order of arrival.

        On an error it reports it and leaves the gate closed. A new step ends one that still waits
        for its verdict: its controller was restarted or has given it up.
        """
        verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        if not isinstance(message, weight_messages.JoinGroup):
            if self._verdict:
                self._verdict.cancel()
            self._verdict, self._receiving = verdict, message.version
        return self._perform(message, verdict)

    async def _perform(self, message: UpdateStep, verdict: asyncio.Future[Verdict]) -> None:
        try:
            match message:
                case weight_messages.UpdateWeights():
                    await self._interrupt()
                    ready = weight_messages.UpdateReady(message.version, self.interruption.seconds)
                    await self._link.send(ready)
                case weight_messages.JoinGroup():
                    await self._join(message)
                case weight_messages.ReceiveBuckets():
                    async with self._engine:
                        await self._update_from_buckets(message, verdict)
                case weight_messages.LoadSnapshot():
                    async with self._engine:
                        await self._update_from_snapshot(message, verdict)
                case weight_messages.Relabel():
                    await self._relabel(message.version)
        except EngineError as e:
            logger.error("weight update: %s", e)
            if isinstance(message, weight_messages.JoinGroup):
                await self._link.send(weight_messages.GroupJoined(message.group, error=str(e)))
            elif not verdict.cancelled():
                updated = weight_messages.Updated(message.version, self._seconds, error=str(e))
                await self._link.send(updated)

    async def _interrupt(self) -> None:
        self._paused_since = time.monotonic()
        self._gate.close(self.interruption.freezes)
        num_running, self._seconds = self._gate.num_in_flight, {}
        await self.interruption.stop()
        self._num_interrupted = num_running if self.interruption.interrupts else 0

    async def _join(self, join: weight_messages.JoinGroup) -> None:
        """Joins an update group, after leaving those of earlier formations."""
        formation = join.group.rsplit("-", 1)[0]
        for old in [group for group in self._groups if group.rsplit("-", 1)[0] != formation]:
            self._groups.remove(old)
            await self._client.leave_group(old)
        await self._client.join_group(join)
        self._groups.append(join.group)
        await self._link.send(weight_messages.GroupJoined(join.group))

    async def _update_from_buckets(
        self, update: weight_messages.ReceiveBuckets, verdict: asyncio.Future[Verdict]
    ) -> None:
        if verdict.cancelled():  # while an earlier step held the engine
            return
        self._phase_started = time.monotonic()
        self._loaded_folder = None
        flush_with_last = self.interruption.flushes_cache and self._can_flush_with_last(update)
        await self._client.begin_update()
        try:
            await self._receive(update, flush_with_last)
        except EngineError:
            with contextlib.suppress(EngineError):
                await self._client.end_update()  # so that a retry can begin
            raise
        await self._client.end_update()
        await self.interruption.wait_drained()
        self._end_phase("load")
        if self.interruption.flushes_cache and not flush_with_last:
            await self._client.flush_cache(FLUSH_TIMEOUT_S)
        self._end_phase("flush")
        digests = await self._check_version(update.version, update.verify)
        expected = await self._await_verdict(update.version, verdict)
        if isinstance(expected, weight_messages.AbandonUpdate):
            await self._link.send(weight_messages.UpdateReady(update.version, {}))
            return
        if update.verify:
            check_digests(digests, expected.digests)
        self._end_phase("digest")
        await self._resume(update.version)

    async def _receive(self, update: weight_messages.ReceiveBuckets, flush_with_last: bool) -> None:
        started = time.monotonic()
        buckets = [(stage.group, bucket) for stage in update.stages for bucket in stage.buckets]
        for number, (group, bucket) in enumerate(buckets, 1):
            is_last = number == len(buckets)
            version = update.version if is_last else None
            flush = is_last and flush_with_last
            await self._client.receive_bucket(group, bucket, update.flattened, version, flush)
            if number == 1:  # part of `load`: the server first ends the requests it runs
                self._seconds["first_bucket"] = time.monotonic() - started

    def _can_flush_with_last(self, update: weight_messages.ReceiveBuckets) -> bool:
        """Returns whether the cache can be dropped with the last bucket.

        A separate call takes 10 to 30 ms on a GPU. The server must be idle or it crashes. It is
        idle if paused; after an abort all requests have returned before the first bucket, but an
        abandoned request may stay in the running batch for one or two more engine calls.
        """
        num_buckets = sum(len(stage.buckets) for stage in update.stages)
        return self.interruption.freezes or num_buckets >= IDLE_AFTER

    async def _update_from_snapshot(
        self, order: weight_messages.LoadSnapshot, verdict: asyncio.Future[Verdict]
    ) -> None:
        """`verdict` is cancelled by a newer step, which finds the gate closed."""
        started = time.monotonic()
        snapshot = await asyncio.to_thread(_read_verified, Path(order.folder))
        check_files_s = time.monotonic() - started
        if verdict.cancelled():
            return
        await self._interrupt()
        self._phase_started = time.monotonic()
        flush, freezes = self.interruption.flushes_cache, self.interruption.freezes
        if snapshot.path != self._loaded_folder:
            flush_at_load = flush and freezes
            await self._client.load_folder(
                snapshot.path, order.version, flush_at_load, self._timeout_s
            )
        self._loaded_folder = None
        await self.interruption.wait_drained()
        self._end_phase("load")
        if flush and not freezes:
            await self._client.flush_cache(FLUSH_TIMEOUT_S)
        self._end_phase("flush")
        digests = await self._check_version(order.version, with_digests=True)
        check_digests(digests, snapshot.manifest.digests)
        self._end_phase("digest")
        self._seconds["check_files"] = check_files_s
        if verdict.cancelled():
            return
        await self._resume(order.version)

    async def _relabel(self, version: int) -> None:
        """Changes the version label only; requests are not interrupted."""
        self._phase_started = time.monotonic()
        self._seconds, self._num_interrupted = {}, 0
        await self._client.relabel(version)
        await self._check_version(version, with_digests=False)
        self._end_phase("relabel")
        self.version = version
        self._gate.open()
        await self._link.send(weight_messages.Updated(version, self._seconds))

    async def _resume(self, version: int) -> None:
        """Continues on weights that were verified, and reports the update."""
        await self.interruption.resume()
        self.version = version
        self._gate.open()
        self._seconds |= self.interruption.seconds
        self._end_phase("resume")
        self._seconds["pause"] = time.monotonic() - self._paused_since
        await self._link.send(
            weight_messages.Updated(version, self._seconds, num_interrupted=self._num_interrupted)
        )

    def _end_phase(self, name: str) -> None:
        now = time.monotonic()
        self._seconds[name], self._phase_started = now - self._phase_started, now

    async def _check_version(self, version: int, with_digests: bool) -> dict[str, str]:
        """Returns the server's digests. Raises EngineError if it reports another version."""

        async def checksums() -> dict[str, str]:
            return await self._client.checksums() if with_digests else {}

        digests, served = await asyncio.gather(checksums(), self._client.served_version())
        if served != str(version):
            raise EngineError(f"the server reports version {served}, expected {version}")
        return digests

    async def _await_verdict(self, version: int, verdict: asyncio.Future[Verdict]) -> Verdict:
        """Raises CancelledError, which ends the step silently, when a new step has begun."""
        await asyncio.wait([verdict], timeout=self._timeout_s)
        if not verdict.done():
            raise EngineError(
                f"the trainer's digests of version {version} did not arrive within "
                f"weights.update_timeout_s = {self._timeout_s:.0f}"
            )
        return verdict.result()


def _read_verified(folder: Path) -> Snapshot:
    """Reads a snapshot. Raises EngineError if its files do not match its manifest."""
    snapshot = snapshots.read(folder)
    if snapshot is None:
        raise EngineError(f"{folder} has no readable manifest")
    if damage := snapshots.find_damage(snapshot):
        raise EngineError(damage)
    return snapshot


def check_digests(held: dict[str, str], expected: dict[str, str]) -> None:
    """Raises EngineError with the first tensor whose digest differs or exists on one side only."""
    if not expected:
        raise EngineError("the trainer sent no digests, so nothing can be verified")
    for name in sorted(held.keys() | expected.keys()):
        if held.get(name) != expected.get(name):
            raise EngineError(
                f"digest mismatch: tensor {name} is {held.get(name)} in the server, "
                f"{expected.get(name)} in the trainer"
            )
