"""The rollout worker: samples in leases, interrupted by weight updates and resumed under the new weights.

An update, seen from here:

    UpdateWeights    new requests wait at the gate; running ones are aborted and return what they have; idle
    ReceiveBuckets   begin, bucket after bucket, end; the prefix cache is dropped: nothing of the old weights is left
    WeightDigests    the engine's digests against the trainer's; equal: the gate opens, requests go on by a new
                     prefill of prompt + tokens so far. Anything else: `Updated` with an error, and the gate stays shut
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

from megatron_async_rl.config import Config
from megatron_async_rl.errors import EngineError, Error
from megatron_async_rl.messages import (
    AbandonUpdate,
    AnyMessage,
    Failed,
    Generate,
    Generated,
    GenerateFailed,
    GroupJoined,
    Heartbeat,
    Hello,
    JoinGroup,
    ReceiveBuckets,
    Shutdown,
    Updated,
    UpdateReady,
    UpdateWeights,
    WeightDigests,
)
from megatron_async_rl.rollout.client import EngineClient, Sampling
from megatron_async_rl.rollout.server import Server
from megatron_async_rl.rollout.workflow import Completion, Workflow
from megatron_async_rl.tokenizer import Tokenizer
from megatron_async_rl.transport import Link
from megatron_async_rl.types import Segment

logger = logging.getLogger(__name__)
HEARTBEAT_S = 2.0
ABORT_AGAIN_S = 0.05  # a request on its way to the scheduler escapes an abort: repeat until none is out


class RolloutWorker:
    def __init__(self, name: str, config: Config, link: Link, server: Server, workflow: Workflow) -> None:
        self.tokenizer = Tokenizer(config.model.path)
        self._name = name
        self._config = config
        self._link = link
        self._server = server
        self._client: EngineClient = server.client
        self._workflow = workflow
        self._serving = asyncio.Event()  # the gate: set while the engine holds verified weights
        self._num_requests = 0  # out at the engine
        self._idle = asyncio.Condition()
        self._tokens_generated = 0
        self._groups: list[str] = []
        self._digests: asyncio.Queue[WeightDigests | AbandonUpdate] = asyncio.Queue()
        self._update_seconds: dict[str, float] = {}
        self._num_interrupted = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serves until Shutdown. Raises EngineError when the server dies."""
        rollout = self._config.rollout
        await self._link.join(Hello("rollout", self._name, os.getpid(), capacity=rollout.max_concurrent_samples))
        loops = [asyncio.create_task(loop()) for loop in (self._receive, self._beat, self._server.watch)]
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Error as e:
            await self._link.send(Failed(str(e)))
            raise
        finally:
            for task in [*loops, *self._tasks]:
                task.cancel()

    async def generate(self, ids: list[int], sampling: Sampling) -> Completion:
        """Generates to the end across any number of weight updates: one segment per version.

        An update makes the engine return what it has. Its KV cache came from the old weights, so prompt and tokens so
        far go in again as a new prompt and are prefilled under the new weights.
        """
        tokens, segments, budget = list(ids), [], sampling.max_new_tokens
        while True:
            await self._serving.wait()
            part = await self._request(tokens, Sampling(budget, sampling.temperature, sampling.stop_token_ids))
            for segment in part.segments:
                segments.append(segment)
                tokens += segment.ids
                budget -= len(segment.ids)
                self._tokens_generated += len(segment.ids)
            if part.stop != "abort":
                return Completion(_merge(segments), part.stop)
            if len(tokens) > len(ids) and tokens[-1] in sampling.stop_token_ids:
                return Completion(_merge(segments), "stop")  # the abort met a request that had just ended
            if budget == 0:
                return Completion(_merge(segments), "length")

    async def _request(self, tokens: list[int], sampling: Sampling) -> Any:
        self._num_requests += 1
        try:
            return await self._client.generate(tokens, sampling)
        finally:
            self._num_requests -= 1
            if not self._num_requests:
                async with self._idle:
                    self._idle.notify_all()

    # ---- loops

    async def _receive(self) -> None:
        while True:
            message = await self._link.receive()
            if isinstance(message, Shutdown):
                logger.info("ending: %s", message.reason)
                return
            if isinstance(message, WeightDigests | AbandonUpdate):
                self._digests.put_nowait(message)
            elif isinstance(message, Generate):
                for index in message.indices:
                    self._spawn(self._sample(message, index))
            else:
                self._spawn(self._weights(message))

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _beat(self) -> None:
        while True:
            await self._link.send(Heartbeat(self._num_requests, self._tokens_generated))
            await asyncio.sleep(HEARTBEAT_S)

    # ---- samples

    async def _sample(self, lease: Generate, index: int) -> None:
        who = (lease.epoch, lease.group_id, lease.attempt, index)
        sampling = Sampling(lease.max_new_tokens, lease.temperature, sorted(self.tokenizer.eos_ids))
        try:
            sample = await self._workflow.run(lease.prompt, self, sampling)
        except EngineError as e:
            await self._link.send(GenerateFailed(*who, error=str(e)))
        except Exception as e:  # the user's workflow: its failure is this sample's, not the worker's
            logger.exception("the workflow failed on group %d", lease.group_id)
            await self._link.send(GenerateFailed(*who, error=f"{type(e).__name__}: {e}"))
        else:
            await self._link.send(Generated(*who, sample=sample))

    # ---- weights

    async def _weights(self, message: AnyMessage) -> None:
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
                await self._link.send(Updated(message.version, self._update_seconds, error=str(e)))

    async def _interrupt(self, version: int) -> None:
        started = time.monotonic()
        self._serving.clear()
        self._num_interrupted = self._num_requests
        deadline = started + self._config.rollout.request_timeout_s
        while self._num_requests:
            await self._client.abort_all()
            async with self._idle:
                try:
                    await asyncio.wait_for(self._idle.wait_for(lambda: not self._num_requests), ABORT_AGAIN_S)
                except TimeoutError:
                    if time.monotonic() > deadline:
                        raise EngineError(f"{self._num_requests} requests did not end after an abort") from None
        self._update_seconds = {"interrupt": time.monotonic() - started}
        await self._link.send(UpdateReady(version, self._update_seconds))

    async def _join(self, join: JoinGroup) -> None:
        formation = join.group.rsplit("-", 1)[0]
        for old in [group for group in self._groups if group.rsplit("-", 1)[0] != formation]:
            self._groups.remove(old)
            await self._client.leave_group(old)
        await self._client.join_group(join)
        self._groups.append(join.group)
        await self._link.send(GroupJoined(join.group))

    async def _take_in(self, update: ReceiveBuckets) -> None:
        buckets = [(stage.group, bucket) for stage in update.stages for bucket in stage.buckets]
        clock = time.monotonic()

        def lap(phase: str) -> None:
            nonlocal clock
            now = time.monotonic()
            self._update_seconds[phase], clock = now - clock, now

        await self._client.begin_update()
        for number, (group, bucket) in enumerate(buckets, 1):
            await self._client.receive_bucket(group, bucket, update.version if number == len(buckets) else None)
        await self._client.end_update()
        lap("load")
        await self._client.flush_cache()
        lap("flush")
        held = await self._client.checksums() if update.verify else {}
        served = await self._client.served_version()
        if served != str(update.version):
            raise EngineError(f"the engine says it holds version {served}, expected {update.version}")
        expected = await self._digests_of(update.version)
        if isinstance(expected, AbandonUpdate):
            await self._link.send(UpdateReady(update.version, {}))
            return
        if update.verify:
            _compare(held, expected.digests)
        lap("digest")
        self._serving.set()
        await self._link.send(Updated(update.version, self._update_seconds, num_interrupted=self._num_interrupted))

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


def _merge(segments: list[Segment]) -> list[Segment]:
    """Adjacent segments of one version become one."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].version == segment.version:
            last = merged[-1]
            merged[-1] = Segment(last.version, last.ids + segment.ids, last.logprobs + segment.logprobs)
        else:
            merged.append(segment)
    return merged


def _compare(held: dict[str, str], expected: dict[str, str]) -> None:
    """Raises EngineError naming the first tensor whose digest differs, is missing or is one too many."""
    if not expected:
        raise EngineError("the trainer sent no digests, so nothing can be verified")
    for name in sorted(held.keys() | expected.keys()):
        if held.get(name) != expected.get(name):
            raise EngineError(
                f"tensor {name} in the engine digests to {held.get(name)}, the trainer's to {expected.get(name)}"
            )
