"""Turns each message from a worker into events for the core.

Called by the controller's loop. Replies that need no decision (Welcome, Refused, RejoinRequest) are
sent here; messages about updates, batches and checkpoints go to the parts for those.
"""

from __future__ import annotations

import logging
import time
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
from megatron_async_rl.errors import Error, ProtocolError
from megatron_async_rl.protocol import messages
from megatron_async_rl.protocol.messages import AnyMessage, Hello, Refused
from megatron_async_rl.protocol.transport import Peer
from megatron_async_rl.protocol.wire import SCHEMA, UnknownHello

logger = logging.getLogger(__name__)


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
        self._tokenizer = fingerprint(context.config.model.path)
        self._updates = updates
        self._delivery = delivery
        self._saving = saving
        self._handlers: dict[type, Callable[[str, Any], list[CoreEvent]]] = {
            messages.Heartbeat: self._for_core,
            messages.Failed: self._failed,
            messages.Generated: self._for_core,
            messages.PartialSample: self._for_core,
            messages.GenerateFailed: self._generate_failed,
            messages.ScoreRequest: self._for_core,
            messages.ScoreResult: self._score_result,
            messages.GetBatch: self._get_batch,
            messages.StepDone: self._for_core,
            messages.CheckpointSaved: self._checkpoint_saved,
            messages.PublishOffer: self._publish_offer,
            messages.UpdateReady: self._update_reply,
            messages.GroupOpened: self._update_reply,
            messages.GroupJoined: self._update_reply,
            messages.BucketsSent: self._update_reply,
            messages.SnapshotWritten: self._update_reply,
            messages.Updated: self._update_reply,
        }

    async def handle(self, peer: Peer, message: AnyMessage | UnknownHello) -> list[CoreEvent]:
        """Returns the events that the message stands for; none from a worker that must rejoin.

        Raises ProtocolError for a message that no worker may send.
        """
        hub = self._workers.hub
        if isinstance(message, Hello | UnknownHello) and (mismatch := self._mismatch(message)):
            logger.error("refused: %s", mismatch)
            await hub.send(peer, Refused(mismatch))
            return []
        if newer := self._workers.replaced_by(peer):
            await hub.send(peer, Refused(f"its name was taken over: {newer}"))
            return []
        if isinstance(message, Hello):
            return await self._welcome(peer, message)
        name = self._workers.name_of(peer)
        if name is None or not self.is_trusted(name):
            await hub.send(peer, messages.RejoinRequest())
            return []
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"{name} sent {type(message).__name__}, which no worker may send")
        return handler(name, message)

    def is_trusted(self, name: str) -> bool:
        """Returns False for a worker that the core considers lost: it must say hello first."""
        fleet = self._core.fleet
        is_trainer = self._workers[name].hello.role == "trainer"
        return is_trainer or name in fleet.rollout or name in fleet.reward

    # ---- joining

    def _mismatch(self, hello: Hello | UnknownHello) -> str:
        """Returns why this worker and the controller are incompatible; empty if they are not."""
        versions = (
            ("package version", hello.package, __version__),
            ("message schema", hello.schema, SCHEMA),
        )
        found = [
            f"{kind} {theirs or 'unknown'} there, {ours} here"
            for kind, theirs, ours in versions
            if theirs != ours
        ]
        remedy = "install the same version of megatron_async_rl on every host"
        if not found:
            if not isinstance(hello, Hello) or hello.role == "reward":
                return ""
            if hello.tokenizer == self._tokenizer:
                return ""
            found = [f"tokenizer {hello.tokenizer or 'unknown'} there, {self._tokenizer} here"]
            remedy = (
                "put the same files under model.path on every host "
                "(tokenizer.json, tokenizer_config.json)"
            )
        return f"{hello.name} and the controller differ: {'; '.join(found)}; {remedy}"

    async def _welcome(self, peer: Peer, hello: Hello) -> list[CoreEvent]:
        was_here = self._workers.join(peer, hello)
        await self._workers.hub.send(peer, messages.Welcome(self._core.epoch))
        logger.info("%s joined (pid %d)", hello.name, hello.pid)
        self._updates.worker_joined(hello)
        if hello.role == "rollout":
            # a server that was lost since this controller started must verify its weights again
            serving = -1 if was_here else hello.serving
            return [inputs.RolloutJoined(hello.name, hello.capacity, serving)]
        if hello.role == "reward":
            return [inputs.RewardJoined(hello.name, hello.capacity)]
        self._delivery.trainer_joined()
        return [inputs.TrainerJoined(hello.leader)]

    # ---- messages of workers that have joined

    def _for_core(self, name: str, message: AnyMessage) -> list[CoreEvent]:
        return [inputs.Received(name, message)]

    def _failed(self, name: str, message: messages.Failed) -> list[CoreEvent]:
        if not self._progress.training:
            raise Error(f"{name}: {message.error}")
        logger.error("%s: %s", name, message.error)
        return [inputs.WorkerLost(name)]

    def _generate_failed(self, name: str, message: messages.GenerateFailed) -> list[CoreEvent]:
        logger.warning("%s: sample %s: %s", name, message.key, message.error)
        return [inputs.Received(name, message)]

    def _score_result(self, name: str, message: messages.ScoreResult) -> list[CoreEvent]:
        if message.reward is None:
            logger.warning("%s: no score for sample %s: %s", name, message.key, message.error)
        return [inputs.Received(name, message)]

    def _get_batch(self, name: str, message: messages.GetBatch) -> list[CoreEvent]:
        self._delivery.batch_requested(time.monotonic())
        leader = self._workers[name].hello.leader
        return [inputs.BatchRequested(leader, message.version)]

    def _checkpoint_saved(self, name: str, message: messages.CheckpointSaved) -> list[CoreEvent]:
        self._saving.checkpoint_saved(message)
        return []

    def _publish_offer(self, name: str, message: messages.PublishOffer) -> list[CoreEvent]:
        self._updates.offered(name, message)
        return []

    def _update_reply(self, name: str, message: AnyMessage) -> list[CoreEvent]:
        self._updates.replied(name, message)
        return [inputs.Received(name, message)]
