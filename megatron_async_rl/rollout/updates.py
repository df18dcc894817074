"""A weight update, seen from a server (controller/publisher.py draws the whole exchange):

UpdateWeights    new requests wait at the gate; running ones are stopped (interruption.py says how)
ReceiveBuckets   begin, bucket after bucket, end; with `recompute` the prefix cache is dropped: nothing of the old
                 weights is left
WeightDigests    the engine's digests against the trainer's; equal: requests go on and the gate opens. Anything else:
                 `Updated` with an error, and the gate stays shut
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from megatron_async_rl.config import Config
from megatron_async_rl.errors import EngineError
from megatron_async_rl.messages import (
    AbandonUpdate,
    AnyMessage,
    GroupJoined,
    JoinGroup,
    ReceiveBuckets,
    Updated,
    UpdateReady,
    UpdateWeights,
    WeightDigests,
)
from megatron_async_rl.rollout.client import EngineClient
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.interruption import interruption
from megatron_async_rl.transport import Link

logger = logging.getLogger(__name__)
IDLE_AFTER = 3  # calls to the engine: one that nobody waits for any more has left its batches by then
FLUSH_PATIENCE_S = 5.0


class WeightUpdates:
    """Takes updates in, one at a time, and opens the gate after each that is as it must be."""

    def __init__(self, config: Config, link: Link, client: EngineClient, gate: Gate) -> None:
        self.version = -1  # of the weights, when last verified
        self.interruption = interruption(config, client, gate)
        self._config = config
        self._link = link
        self._client = client
        self._gate = gate
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
        except EngineError as e:
            logger.error("weight update: %s", e)
            if isinstance(message, JoinGroup):
                await self._link.send(GroupJoined(message.group, error=str(e)))
            else:
                await self._link.send(Updated(message.version, self._seconds, error=str(e)))

    async def _interrupt(self, version: int) -> None:
        self._paused_since = time.monotonic()
        self._gate.shut()
        self._num_interrupted = self._gate.num_out
        self._seconds = {}
        await self.interruption.stop()
        await self._link.send(UpdateReady(version, self.interruption.seconds))

    async def _join(self, join: JoinGroup) -> None:
        formation = join.group.rsplit("-", 1)[0]
        for old in [group for group in self._groups if group.rsplit("-", 1)[0] != formation]:
            self._groups.remove(old)
            await self._client.leave_group(old)
        await self._client.join_group(join)
        self._groups.append(join.group)
        await self._link.send(GroupJoined(join.group))

    async def _take_in(self, update: ReceiveBuckets) -> None:
        clock = time.monotonic()

        def lap(phase: str) -> None:
            nonlocal clock
            now = time.monotonic()
            self._seconds[phase], clock = now - clock, now

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
        held, served = await asyncio.gather(self._held(update.verify), self._client.served_version())
        if served != str(update.version):
            raise EngineError(f"the engine says it holds version {served}, expected {update.version}")
        expected = await self._digests_of(update.version)
        if isinstance(expected, AbandonUpdate):
            await self._link.send(UpdateReady(update.version, {}))
            return
        if update.verify:
            compare(held, expected.digests)
        lap("digest")
        await self.interruption.resume()
        self.version = update.version
        self._gate.open()
        self._seconds |= self.interruption.seconds
        lap("resume")
        self._seconds["pause"] = time.monotonic() - self._paused_since
        await self._link.send(Updated(update.version, self._seconds, num_interrupted=self._num_interrupted))

    async def _receive(self, update: ReceiveBuckets) -> None:
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

    def _flushes_at_once(self, update: ReceiveBuckets) -> bool:
        """Whether the cache can be dropped with the last bucket: a call for it alone takes 10 to 30 ms on a GPU.

        The engine must be idle then, or it dies. It is when it is paused; else its last requests have been answered
        before the first bucket, and only an answer that nobody waited for can be under way for one or two batches more.
        """
        return self.interruption.freezes or sum(len(stage.buckets) for stage in update.stages) >= IDLE_AFTER

    async def _held(self, verify: bool) -> dict[str, str]:
        return await self._client.checksums() if verify else {}

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


def compare(held: dict[str, str], expected: dict[str, str]) -> None:
    """Raises EngineError naming the first tensor whose digest differs, is missing or is one too many."""
    if not expected:
        raise EngineError("the trainer sent no digests, so nothing can be verified")
    for name in sorted(held.keys() | expected.keys()):
        if held.get(name) != expected.get(name):
            raise EngineError(
                f"tensor {name} in the engine digests to {held.get(name)}, the trainer's to {expected.get(name)}"
            )
