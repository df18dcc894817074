"""Turns each message from a worker into events for the core.

Called by the controller's loop. Every message passes protocol/rules.py first. Replies that need
no decision (Welcome, Refused, RejoinRequest) are sent here; messages about updates, batches and
checkpoints go to the parts for those.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from megatron_async_rl import __version__
from megatron_async_rl.controller.context import Context
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.inputs import CoreEvent
from megatron_async_rl.controller.delivery import BatchDelivery
from megatron_async_rl.controller.saving import CheckpointCommitter
from megatron_async_rl.controller.weight_sync.coordinator import UpdateCoordinator
from megatron_async_rl.data.tokenizer import fingerprint
from megatron_async_rl.errors import Error
from megatron_async_rl.protocol import messages, rules, weight_messages
from megatron_async_rl.protocol.hub import Peer
from megatron_async_rl.protocol.messages import Hello, Refused
from megatron_async_rl.protocol.wire import SCHEMA, AnyMessage, Malformed, UnknownHello

logger = logging.getLogger(__name__)
MAX_LOGGED = 100  # refusals of workers that have not joined
FOR_CORE: tuple[type, ...] = (
    messages.Heartbeat, messages.Generated, messages.PartialSample, messages.GenerateFailed,
    messages.ScoreRequest, messages.ScoreResult, messages.StepDone, messages.ProbeResult,
)  # fmt: skip
WAITING = (messages.Heartbeat, messages.GetBatch, weight_messages.PublishOffer)  # of a trainer
UPDATE_REPLIES: tuple[type, ...] = (
    weight_messages.UpdateReady, weight_messages.GroupOpened, weight_messages.GroupJoined,
    weight_messages.BucketsSent, weight_messages.SnapshotWritten, weight_messages.Updated,
)  # fmt: skip


class MessageHandlers:
    def __init__(
        self,
        context: Context,
        updates: UpdateCoordinator,
        delivery: BatchDelivery,
        saving: CheckpointCommitter,
    ) -> None:
        self._core = context.core
        self._workers = context.workers
        self._progress = context.progress
        config = context.config
        self._tokenizer = fingerprint(config.model.path)
        stages = config.parallel_size("pipeline_model") if config.has_trainer else 1
        self._sizes = config.run.steps, config.num_leaders, stages
        self.num_refused: Counter[str] = Counter()  # messages, by the name of the worker
        self._num_logged = 0
        self._updates = updates
        self._delivery = delivery
        self._saving = saving
        self._handlers: dict[type, Callable[[str, Any], list[CoreEvent]]] = {
            **dict.fromkeys(FOR_CORE, self._for_core),
            **dict.fromkeys(UPDATE_REPLIES, self._update_reply),
            messages.Failed: self._failed,
            messages.GetBatch: self._get_batch,
            messages.CheckpointSaved: self._checkpoint_saved,
            weight_messages.PublishOffer: self._publish_offer,
        }

    async def handle(
        self, peer: Peer, message: AnyMessage | UnknownHello | Malformed
    ) -> list[CoreEvent]:
        """Returns the events of the message; none from a worker that must rejoin.

        The sender of a wrong message is refused, and its work is given to others.
        """
        if reason := self._workers.refused(peer):
            await self._workers.hub.send(peer, Refused(reason))
            return []
        name = self._workers.name_of(peer)
        if isinstance(message, Hello | UnknownHello):
            return await self._hello(peer, name, message)
        if name is None or not self.is_trusted(name):
            if not isinstance(message, Malformed):
                await self._workers.hub.send(peer, messages.RejoinRequest())
            return []
        hello, limits = self._workers[name].hello, self._limits()
        if isinstance(message, Malformed):
            reason = rules.printable(message.reason)
            return await self._refuse(peer, name, f"{name} sent {reason}")
        if problem := rules.problem(message, hello, limits):
            return await self._refuse(peer, name, f"{name} sent {problem}")
        self._workers.timeline.received(name, message)
        if self._workers.ending and isinstance(message, WAITING) and hello.role == "trainer":
            await self._workers.hub.send(peer, self._workers.ending)  # it may have lost the first
        return self._handlers[type(message)](name, message)

    async def _refuse(self, peer: Peer, name: str | None, reason: str) -> list[CoreEvent]:
        """Refuses a socket; its work, if it has joined, is given to others. Logs once per name."""
        if name is not None:
            self._workers.refuse(peer, reason)
        await self._workers.hub.send(peer, Refused(reason))
        counted = name or "unknown workers"
        self.num_refused[counted] += 1
        if self.num_refused[counted] == 1 or (name is None and self._num_logged < MAX_LOGGED):
            self._num_logged += 1
            logger.error("refused: %s", reason)
        return [] if name is None else [inputs.WorkerLost(name)]

    def _limits(self) -> rules.Limits:
        return rules.Limits(self._core.version, *self._sizes)

    def is_trusted(self, name: str) -> bool:
        """Returns False for a worker that the core considers lost: it must send Hello first."""
        fleet = self._core.fleet
        is_trainer = self._workers[name].hello.role == "trainer"
        return is_trainer or name in fleet.rollout or name in fleet.reward

    # ---- joining

    async def _hello(
        self, peer: Peer, name: str | None, hello: Hello | UnknownHello
    ) -> list[CoreEvent]:
        """`name`: of the worker that has joined over this socket before."""
        problem = self._mismatch(hello)
        if isinstance(hello, UnknownHello):
            problem = problem or f"a malformed Hello of {rules.printable(hello.name)}"
        else:
            problem = problem or rules.hello_problem(hello, self._limits())
            if name not in (None, hello.name):
                problem = problem or f"{name} sent a second Hello as {hello.name}"
            problem = problem or self._workers.conflict(hello)
            if not problem:
                return await self._welcome(peer, hello)
        return await self._refuse(peer, name, problem)

    def _mismatch(self, hello: Hello | UnknownHello) -> str:
        """Returns why this worker and the controller are incompatible; empty if they are not."""
        versions = [
            ("package version", hello.package, __version__),
            ("message schema", hello.schema, SCHEMA),
        ]
        remedy = "install the same version of megatron_async_rl on every host"
        is_same_package = (hello.package, hello.schema) == (__version__, SCHEMA)
        if is_same_package and isinstance(hello, Hello) and hello.role != "reward":
            versions = [("tokenizer", hello.tokenizer, self._tokenizer)]
            remedy = (
                "put the same files under model.path on every host "
                "(tokenizer.json, tokenizer_config.json)"
            )
        found = [
            f"{kind} {rules.printable(theirs) or 'unknown'} there, {ours} here"
            for kind, theirs, ours in versions
            if theirs != ours
        ]
        if not found:
            return ""
        name = rules.printable(hello.name)
        return f"{name} and the controller differ: {'; '.join(found)}; {remedy}"

    async def _welcome(self, peer: Peer, hello: Hello) -> list[CoreEvent]:
        was_here = self._workers.join(peer, hello)
        await self._workers.hub.send(peer, messages.Welcome(self._core.epoch))
        if self._workers.ending:
            await self._workers.hub.send(peer, self._workers.ending)
        logger.info("%s joined (pid %d)", hello.name, hello.pid)
        self._progress.last_progress = time.monotonic()  # a trainer takes long to load
        self._updates.worker_joined(hello)
        if hello.role == "rollout":
            # a server that was lost since this controller started must verify its weights again
            serving = -1 if was_here else hello.serving
            return [inputs.RolloutJoined(hello.name, hello.capacity, serving)]
        if hello.role == "reward":
            return [inputs.RewardJoined(hello.name, hello.capacity)]
        if hello.leader >= 0:
            self._delivery.leader_joined(hello.leader)
        return [inputs.TrainerJoined(hello.leader)]

    # ---- messages of workers that have joined

    def _for_core(self, name: str, message: AnyMessage) -> list[CoreEvent]:
        return [inputs.Received(name, message)]

    def _failed(self, name: str, message: messages.Failed) -> list[CoreEvent]:
        if not self._progress.training:
            raise Error(f"{name}: {message.error}")
        logger.error("%s: %s", name, message.error)
        return [inputs.WorkerLost(name)]

    def _get_batch(self, name: str, message: messages.GetBatch) -> list[CoreEvent]:
        self._delivery.batch_requested(time.monotonic())
        leader = self._workers[name].hello.leader
        if self._core.batch_selector.requests.get(leader) == message.version:
            self._updates.request_repeated(name)
        return [inputs.BatchRequested(leader, message.version)]

    def _checkpoint_saved(self, name: str, message: messages.CheckpointSaved) -> list[CoreEvent]:
        if message.version <= self._core.version:
            self._saving.checkpoint_saved(name, message)
        return []  # otherwise the report of the step was lost: the trainer repeats both

    def _publish_offer(self, name: str, message: weight_messages.PublishOffer) -> list[CoreEvent]:
        self._updates.offered(name, message)
        return []

    def _update_reply(self, name: str, message: AnyMessage) -> list[CoreEvent]:
        self._updates.replied(name, message)
        return [inputs.Received(name, message)]
