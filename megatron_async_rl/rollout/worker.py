"""The rollout worker: runs the workflows of leased samples on one SGLang server.

Weight updates interrupt samples, which resume under the new weights (generation.py). Each
interrupted sample goes to the controller as a partial sample, for its next lease if this worker is
lost. When the controller restarts, all leases are void: their samples end, and their tokens are
kept here for the leases to come (samples/partials.py). Loops, and when each one proceeds:

    _receive          at a message: samples and update steps run as tasks; ends at Shutdown
    _send_heartbeats  every HEARTBEAT_S
    _probe            after a request timed out and the gate is open: raises if the server hangs
    server.watch      raises when the server ends
    _wait_sigterm     at SIGTERM: hands in the tokens of samples in flight, raises Preempted

The first loop to end ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import os
import signal
import time
from collections.abc import Coroutine
from typing import Any

import msgspec

from megatron_async_rl import hooks
from megatron_async_rl.config.config import Config
from megatron_async_rl.data.tokenizer import Tokenizer, fingerprint
from megatron_async_rl.errors import EngineError, Preempted, ProtocolError
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.routing import replayed_routing
from megatron_async_rl.observability.error_log import ErrorLog, user_error
from megatron_async_rl.protocol import messages, weight_messages
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.protocol.types import Partial
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.engine_process import SGLangServer
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.generation import Generator
from megatron_async_rl.rollout.interruption import ABORT_INTERVAL_S
from megatron_async_rl.rollout.policy import PolicyServices, SamplePolicy, ScoreClient
from megatron_async_rl.rollout.probe import score_windows
from megatron_async_rl.rollout.samples.partials import PartialStore
from megatron_async_rl.rollout.samples.returned import ReturnedSamples
from megatron_async_rl.rollout.weight_update import UpdateStep, WeightUpdates
from megatron_async_rl.rollout.workflow import Workflow

logger = logging.getLogger(__name__)
HEARTBEAT_S = 2.0
FAILURE_PAUSE_S = 1.0  # a dying server fails all samples at once; its end is to be reported first
BLOCKED_S = 5.0  # of the event loop, before it is warned of; less happens on a loaded host
HAND_IN_S = 5.0  # for samples in flight to reach the controller before this process ends


async def sleep_late(seconds: float) -> float:
    """Sleeps, and returns how many seconds too late the event loop came back."""
    began = time.monotonic()
    await asyncio.sleep(seconds)
    return time.monotonic() - began - seconds


def blocked_reason(config: Config) -> str:
    """Returns what may have blocked the event loop: only a workflow of the user's runs in it."""
    workflow = config.rollout.workflow
    if config.has_agent or not hooks.is_custom(workflow):
        return "this host has too few CPU cores for its processes"
    return (
        f"if rollout.workflow = {workflow} waits or computes so long, it must use asyncio.to_thread"
    )


class RolloutWorker:
    def __init__(
        self, name: str, config: Config, link: Link, server: SGLangServer, workflow: Workflow
    ) -> None:
        self._name = name
        self._config = config
        self._link = link
        self._server = server
        self._client = server.client
        self._workflow = workflow
        self.gate = Gate()
        self.updates = WeightUpdates(config, link, server.client, self.gate, server.started_from)
        tokenizer = Tokenizer(config.model.path, config.reward.thinking_tags)
        self.generator = Generator(
            server.client,
            self.gate,
            self.updates.cache_key,
            config.model.context_tokens,
            HfConfig(config.model.path).vocab_size,
            tokenizer.decode_all,
        )
        self._policy_services = PolicyServices(
            config=config,
            tokenizer=tokenizer,
            generator=self.generator,
            partials=PartialStore(),
            scores=ScoreClient(link.send, config.rollout.lease_timeout_s),
            send=link.send,
            routing=replayed_routing(config),
        )
        self._fingerprint = fingerprint(config.model.path)
        self._errors = ErrorLog(logger)
        self._returned = ReturnedSamples(config, logger)
        self._tasks: set[asyncio.Task[None]] = set()
        self._sample_tasks: set[asyncio.Task[None]] = set()  # a subset: the samples under lease

    async def run(self) -> None:
        """Serves until Shutdown. Raises EngineError if the server dies, Preempted at SIGTERM."""
        await self._link.join(self._hello)
        try:
            await self._link.serve(
                self._receive(),
                self._send_heartbeats(),
                self._probe(),
                self._server.watch(),
                self._wait_sigterm(),
            )
        finally:
            for task in self._tasks:
                task.cancel()

    def _hello(self) -> messages.Hello:
        """Sent at the start and to a restarted controller, which voids all earlier leases."""
        if self._sample_tasks:
            self._spawn(self._void_leases())
        return messages.Hello(
            "rollout",
            self._name,
            os.getpid(),
            capacity=self._config.rollout.max_concurrent_samples,
            serving=self.updates.version if self.gate.is_open else -1,
            tokenizer=self._fingerprint,
        )

    # ---- loops

    async def _receive(self) -> None:
        while True:
            message = await self._link.receive()
            match message:
                case messages.Generate():
                    partials = message.partials or [None] * len(message.indices)
                    for index, partial in zip(message.indices, partials, strict=True):
                        task = self._spawn(self._run_sample(message, index, partial))
                        self._sample_tasks.add(task)
                        task.add_done_callback(self._sample_tasks.discard)
                case messages.ProbeRequest():
                    self._spawn(self._answer_probe(message))
                case messages.ScoreResult():
                    self._policy_services.scores.deliver(message)
                case weight_messages.WeightDigests() | weight_messages.AbandonUpdate():
                    self.updates.deliver(message)
                case messages.Shutdown():
                    logger.info("shut down by the controller: %s", message.reason)
                    await self._hand_in()
                    return
                case _ if isinstance(message, UpdateStep):
                    self._spawn(self.updates.handle(message))
                case _:
                    raise ProtocolError(f"a rollout worker received {type(message).__name__}")

    async def _send_heartbeats(self) -> None:
        while True:
            heartbeat = messages.Heartbeat(
                self.gate.num_in_flight,
                self.generator.num_tokens,
                self.gate.idle_s,
                await self._client.load(),
            )
            await self._link.send(heartbeat)
            blocked_s = await sleep_late(HEARTBEAT_S)
            if blocked_s > BLOCKED_S:
                reason = blocked_reason(self._config)
                logger.warning(
                    "all samples of this worker stood still for %.0f s: %s", blocked_s, reason
                )

    async def _probe(self) -> None:
        """Raises EngineError if the server generates nothing after a request timed out."""
        while True:
            await self.generator.timed_out.wait()
            async with self.gate.request():  # an update in progress would detect it by itself
                alive = await self._client.can_generate()
            if not alive:
                limit_s = self._config.rollout.lease_timeout_s
                raise EngineError(
                    "the SGLang server hangs: it answered neither a request within "
                    f"rollout.lease_timeout_s = {limit_s:.0f} nor then a probe of one token"
                )
            self.generator.timed_out.clear()

    async def _answer_probe(self, request: messages.ProbeRequest) -> None:
        if result := await score_windows(request, self._client, self.gate, self.updates):
            await self._link.send(result)

    async def _wait_sigterm(self) -> None:
        """Preemption: this host is taken away, and the run continues elsewhere."""
        sigterm = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sigterm.set)
        await sigterm.wait()
        await self._hand_in()
        raise Preempted("ended by SIGTERM")

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ---- samples

    async def _run_sample(
        self, lease: messages.Generate, index: int, partial: Partial | None
    ) -> None:
        key = lease.key(index)
        policy = SamplePolicy(self._policy_services, lease, index, partial)
        stop_ids = sorted(policy.tokenizer.eos_ids)
        sampling = Sampling(
            lease.max_new_tokens,
            lease.temperature,
            stop_ids,
            lease.top_p,
            lease.top_k,
            lease.min_p,
            self._config.rollout.stop,
        )
        try:
            # a workflow may change its row, such as by appending to a list of messages
            row = copy.deepcopy(lease.prompt.row)
            prompt = msgspec.structs.replace(lease.prompt, row=row)
            sample = await self._workflow.run(prompt, policy, sampling)
            frames = self._returned.encoded(key, sample, policy.with_experts)
        except EngineError as e:
            await asyncio.sleep(FAILURE_PAUSE_S)
            await self._link.send(messages.GenerateFailed(key, error=str(e)))
        # a user's workflow may raise anything: it fails this sample only
        except (Exception, SystemExit, asyncio.CancelledError) as e:
            if (task := asyncio.current_task()) and task.cancelling():
                return  # its lease has ended; SystemExit would end the worker
            error = user_error(e)
            self._errors.log(f"the workflow failed on group {lease.group_id}", error)
            await self._link.send(messages.GenerateFailed(key, error=error))
        else:
            await self._link.send_encoded(frames)

    async def _hand_in(self) -> None:
        """Aborts the requests in flight, so that their tokens reach the controller; best effort."""
        if not self.gate.num_in_flight:
            return
        self.gate.close()
        with contextlib.suppress(EngineError, TimeoutError):
            await asyncio.wait_for(self._abort_until_idle(), HAND_IN_S)

    async def _abort_until_idle(self) -> None:
        while self.gate.num_in_flight:
            await self._client.abort_all()
            await asyncio.sleep(ABORT_INTERVAL_S)

    async def _void_leases(self) -> None:
        """Ends the samples under lease; the partial store keeps their tokens."""
        tasks = list(self._sample_tasks)
        if not tasks:
            return  # an earlier hello has ended them
        self._sample_tasks.clear()
        with contextlib.suppress(EngineError):
            await self._client.abort_all()
        await asyncio.wait(tasks, timeout=ABORT_INTERVAL_S)
        for task in tasks:
            task.cancel()
