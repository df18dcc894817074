"""The rollout worker: samples in leases, interrupted by weight updates and resumed under the new weights.

What an interruption leaves of a sample goes to the controller, which hands it to whoever gets the sample next. When the
controller itself was gone, all leases are void; what this worker had is kept here for the leases to come.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import Any

from megatron_async_rl.config.config import Config
from megatron_async_rl.data.tokenizer import Tokenizer, fingerprint
from megatron_async_rl.errors import (
    DataError,
    EngineError,
    EngineTimeout,
    Error,
    ScoreUnavailable,
    Preempted,
)
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.protocol.messages import (
    AbandonUpdate,
    Failed,
    Generate,
    Generated,
    GenerateFailed,
    Heartbeat,
    Hello,
    PartialSample,
    ScoreRequest,
    ScoreResult,
    Shutdown,
    WeightDigests,
)
from megatron_async_rl.protocol.transport import Link
from megatron_async_rl.protocol.types import Partial, Sample, SampleKey, Segment
from megatron_async_rl.rollout.engine_client import EngineClient, Part, Sampling
from megatron_async_rl.rollout.engine_process import Server
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.interruption import ABORT_AGAIN_S
from megatron_async_rl.rollout.policy import SampleLease
from megatron_async_rl.rollout.weight_update import WeightUpdates
from megatron_async_rl.rollout.workflow import Completion, Workflow

logger = logging.getLogger(__name__)
HEARTBEAT_S = 2.0
FAILURE_PAUSE_S = 1.0  # a server that has just died fails all it is given at once: its end is known before we say so
HAND_IN_S = 5.0  # for the samples in flight to be handed in at the end


class RolloutWorker:
    def __init__(
        self, name: str, config: Config, link: Link, server: Server, workflow: Workflow
    ) -> None:
        self.tokenizer = Tokenizer(config.model.path)
        self._fingerprint = fingerprint(config.model.path)
        self._vocabulary_size = HfConfig(config.model.path).vocab_size
        self._name = name
        self._config = config
        self._link = link
        self._server = server
        self._client: EngineClient = server.client
        self._workflow = workflow
        self.gate = Gate()
        self.updates = WeightUpdates(config, link, server.client, self.gate, server.started_from)
        self._tokens_generated = 0
        self._doubted = asyncio.Event()  # a request was not answered in time
        self._tasks: set[asyncio.Task[None]] = set()
        self._leases: set[asyncio.Task[None]] = set()  # those of them that make samples
        self._score_requests: dict[tuple[SampleKey, int], asyncio.Future[ScoreResult]] = {}
        self.left: dict[tuple[int, int], Partial] = {}  # (group, index) -> its tokens so far

    async def run(self) -> None:
        """Serves until Shutdown. Raises EngineError when the server dies, Preempted at SIGTERM."""
        rollout = self._config.rollout
        self._capacity = rollout.max_concurrent_samples
        await self._link.join(self._hello)
        loops = [
            asyncio.create_task(loop())
            for loop in (self._receive, self._beat, self._probe, self._server.watch, self._leave)
        ]
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

    def _hello(self) -> Hello:
        """Said at the start, and again to a controller that does not know us: every lease so far is void then."""
        if self._leases:
            self._spawn(self._void_leases())
        serving = self.updates.version if self.gate.is_open else -1
        return Hello(
            "rollout",
            self._name,
            os.getpid(),
            capacity=self._capacity,
            serving=serving,
            tokenizer=self._fingerprint,
        )

    async def generate(
        self, ids: list[int], sampling: Sampling, lease: SampleLease | None = None
    ) -> Completion:
        """Generates to the end across any number of weight updates: one segment per version.

        An update may make the engine return what it has. Its KV cache came from the old weights, so prompt and tokens
        so far go in again as a new prompt and are prefilled under the new weights.

        At most as many tokens as model.context_tokens has room for. Raises DataError for ids that no row of the model's
        embedding belongs to: they would end the engine.
        """
        if not ids or min(ids) < 0 or max(ids) >= self._vocabulary_size:
            raise DataError(
                f"a workflow asked for a generation from {len(ids)} token ids"
                + (f" from {min(ids)} to {max(ids)}" if ids else "")
                + f"; there must be one or more, each from 0 to {self._vocabulary_size - 1} (the model's vocabulary)"
            )
        tokens, segments = list(ids), lease.left_of(ids) if lease else []
        budget = min(sampling.max_new_tokens, self._config.model.context_tokens - len(ids))
        for segment in segments:
            tokens += segment.ids
            budget -= len(segment.ids)
        while True:
            if len(tokens) > len(ids) and tokens[-1] in sampling.stop_token_ids:
                return Completion(
                    _merge(segments), "stop"
                )  # the abort met a request that had just ended
            if budget <= 0:
                return Completion(_merge(segments), "length")
            await self.gate.wait_open()
            part = await self._request(
                tokens, Sampling(budget, sampling.temperature, sampling.stop_token_ids)
            )
            for segment in part.segments:
                segments.append(segment)
                tokens += segment.ids
                budget -= len(segment.ids)
                self._tokens_generated += len(segment.ids)
            if lease and segments:
                await lease.keep(ids, _merge(segments), interrupted=part.stop == "abort")
            if part.stop != "abort":
                return Completion(_merge(segments), part.stop)

    async def _request(self, tokens: list[int], sampling: Sampling) -> Part:
        try:
            async with self.gate.request():
                return await self._client.generate(
                    tokens, sampling, self.updates.interruption.cache_key()
                )
        except EngineTimeout:
            self._doubted.set()
            raise

    # ---- loops

    async def _receive(self) -> None:
        while True:
            message = await self._link.receive()
            if isinstance(message, Shutdown):
                logger.info("ending: %s", message.reason)
                await self._hand_in()
                return
            if isinstance(message, WeightDigests | AbandonUpdate):
                self.updates.hear(message)
            elif isinstance(message, ScoreResult):
                answered = self._score_requests.get((message.key, message.call))
                if answered and not answered.done():
                    answered.set_result(message)
            elif isinstance(message, Generate):
                partials = message.partials or [None] * len(message.indices)
                for index, partial in zip(message.indices, partials, strict=True):
                    task = self._spawn(self._sample(message, index, partial))
                    self._leases.add(task)
                    task.add_done_callback(self._leases.discard)
            else:
                self._spawn(self.updates.step(message))

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _probe(self) -> None:
        """Raises EngineError when a server that left a request unanswered generates nothing at all any more."""
        while True:
            await self._doubted.wait()
            await self.gate.wait_open()
            async with self.gate.request():  # an update would find out by itself
                alive = await self._client.generates()
            if not alive:
                limit_s = self._config.rollout.lease_timeout_s
                raise EngineError(
                    f"the SGLang server hangs: a request was not answered within rollout.lease_timeout_s = {limit_s:.0f}, "
                    "and then a probe of one token was not either"
                )
            self._doubted.clear()

    async def _beat(self) -> None:
        while True:
            await self._link.send(Heartbeat(self.gate.num_out, self._tokens_generated))
            await asyncio.sleep(HEARTBEAT_S)

    async def _leave(self) -> None:
        """SIGTERM: this host is taken away and the run goes on elsewhere, with the tokens that are here. Raises Preempted."""
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
        await asked.wait()
        await self._hand_in()
        raise Preempted("told to end (SIGTERM)")

    # ---- samples

    async def send(self, message: PartialSample) -> None:
        await self._link.send(message)

    async def ask(self, request: ScoreRequest) -> float:
        """Raises ScoreUnavailable."""
        key = (request.key, request.call)
        answered = self._score_requests[key] = asyncio.get_running_loop().create_future()
        limit_s = self._config.rollout.lease_timeout_s
        try:
            await self._link.send(request)
            answer = await asyncio.wait_for(answered, limit_s)
        except TimeoutError:
            raise ScoreUnavailable(f"no verdict within rollout.lease_timeout_s = {limit_s:g}") from None
        finally:
            del self._score_requests[key]
        if answer.reward is None:
            raise ScoreUnavailable(
                f"no score for request {request.call} of sample {request.key}: {answer.error}"
            )
        return answer.reward

    async def _hand_in(self) -> None:
        """Ends what runs, so that every sample's tokens so far reach the controller; bounded, and best effort."""
        if not self.gate.num_out:
            return
        self.gate.shut()
        with contextlib.suppress(EngineError, TimeoutError):
            await asyncio.wait_for(self._until_idle(), HAND_IN_S)

    async def _until_idle(self) -> None:
        while self.gate.num_out:
            await self._client.abort_all()
            await asyncio.sleep(ABORT_AGAIN_S)

    async def _void_leases(self) -> None:
        """The samples of all leases end where they are; their tokens stay here for a new lease."""
        leases = list(self._leases)
        if not leases:
            return  # an earlier hello has seen to them
        self._leases.clear()
        with contextlib.suppress(EngineError):
            await self._client.abort_all()
        await asyncio.wait(leases, timeout=ABORT_AGAIN_S)
        for task in leases:
            task.cancel()

    async def _sample(self, lease: Generate, index: int, partial: Partial | None) -> None:
        key = lease.key(index)
        policy = SampleLease(self, lease, index, partial)
        sampling = Sampling(lease.max_new_tokens, lease.temperature, sorted(self.tokenizer.eos_ids))
        try:
            sample = await self._workflow.run(lease.prompt, policy, sampling)
            room = self._config.model.context_tokens
            if not isinstance(sample, Sample) or len(sample.ids) > room:
                what = (
                    f"{len(sample.ids)} tokens"
                    if isinstance(sample, Sample)
                    else f"a {type(sample).__name__}"
                )
                raise DataError(
                    f"the workflow returned {what}, must be a Sample of at most model.context_tokens = {room}"
                )
        except EngineError as e:
            await asyncio.sleep(FAILURE_PAUSE_S)
            await self._link.send(GenerateFailed(key, error=str(e)))
        except (
            Exception
        ) as e:  # the user's workflow: its failure is this sample's, not the worker's
            logger.exception("the workflow failed on group %d", lease.group_id)
            await self._link.send(GenerateFailed(key, error=f"{type(e).__name__}: {e}"))
        else:
            await self._link.send(Generated(key, sample=sample))


def _merge(segments: list[Segment]) -> list[Segment]:
    """Adjacent segments of one version become one."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].version == segment.version:
            last = merged[-1]
            merged[-1] = Segment(
                last.version, last.ids + segment.ids, last.logprobs + segment.logprobs
            )
        else:
            merged.append(segment)
    return merged
