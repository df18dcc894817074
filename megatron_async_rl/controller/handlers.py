"""What the controller does with each message: hands it to the core, or to the part that waits for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from megatron_async_rl import __version__
from megatron_async_rl.controller.core.actions import Action
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.delivery import Delivery
from megatron_async_rl.controller.length_monitor import LengthMeter
from megatron_async_rl.controller.progress import Progress
from megatron_async_rl.controller.saving import Saving
from megatron_async_rl.controller.weight_sync.coordinator import Updates
from megatron_async_rl.controller.weight_sync.relabel import Relabeler
from megatron_async_rl.controller.weight_sync.snapshot import TrainerPublisher
from megatron_async_rl.controller.workers import Workers
from megatron_async_rl.errors import Error, ProtocolError
from megatron_async_rl.protocol.messages import (
    AnyMessage,
    BucketsSent,
    CheckpointSaved,
    Failed,
    Generated,
    GenerateFailed,
    GetBatch,
    GroupJoined,
    GroupOpened,
    Heartbeat,
    Hello,
    PartialSample,
    PublishOffer,
    Refused,
    RejoinRequest,
    ScoreRequest,
    ScoreResult,
    SnapshotWritten,
    StepDone,
    Updated,
    UpdateReady,
    Welcome,
)
from megatron_async_rl.protocol.transport import Peer
from megatron_async_rl.protocol.wire import SCHEMA, UnknownHello

logger = logging.getLogger(__name__)
_PUBLISH_ANSWERS = (UpdateReady, GroupOpened, GroupJoined, BucketsSent, SnapshotWritten, Updated)


class Handlers:
    def __init__(
        self,
        tokenizer: str,
        core: Core,
        workers: Workers,
        publisher: TrainerPublisher | Relabeler,
        updates: Updates,
        delivery: Delivery,
        saving: Saving,
        lengths: LengthMeter,
        progress: Progress,
        act: Callable[[list[Action]], Awaitable[None]],
    ) -> None:
        self._tokenizer = tokenizer  # fingerprint of ours
        self._core = core
        self._workers = workers
        self._publisher = publisher
        self._updates = updates
        self._delivery = delivery
        self._saving = saving
        self._lengths = lengths
        self._progress = progress
        self._act = act

    async def received(self, peer: Peer, message: AnyMessage | UnknownHello) -> None:
        if isinstance(message, Hello | UnknownHello) and (difference := self._difference(message)):
            logger.error("refused: %s", difference)
            await self._workers.hub.send(peer, Refused(difference))
            return
        if newer := self._workers.replaced_by(peer):
            await self._workers.hub.send(peer, Refused(f"its name was taken over: {newer}"))
            return
        if isinstance(message, Hello):
            await self._welcome(peer, message)
            return
        name = self._workers.name_of(peer)
        if name is None or not self.is_trusted(name):
            await self._workers.hub.send(peer, RejoinRequest())
            return
        self._core.fleet.heard(name, time.monotonic())
        await self._handle(name, message)

    def is_trusted(self, name: str) -> bool:
        """False for a worker that the core has given up as lost: it must say hello first."""
        fleet = self._core.fleet
        return (
            self._workers[name].hello.role == "trainer"
            or name in fleet.rollout
            or name in fleet.reward
        )

    # ---- joining

    def _difference(self, hello: Hello | UnknownHello) -> str:
        """Why this worker and we would not understand each other; empty when we do."""
        found = []
        for what, theirs, ours in (
            ("package version", hello.package, __version__),
            ("message schema", hello.schema, SCHEMA),
        ):
            if theirs != ours:
                found.append(f"{what} {theirs or 'unknown'} there, {ours} here")
        if found:
            remedy = "install the same version of megatron_async_rl on every host"
        elif (
            isinstance(hello, Hello)
            and hello.role != "reward"
            and hello.tokenizer != self._tokenizer
        ):
            found = [f"tokenizer {hello.tokenizer or 'unknown'} there, {self._tokenizer} here"]
            remedy = "put the same files under model.path on every host (tokenizer.json, tokenizer_config.json)"
        else:
            return ""
        return f"{hello.name} and the controller differ: {'; '.join(found)}; {remedy}"

    async def _welcome(self, peer: Peer, hello: Hello) -> None:
        core, now = self._core, time.monotonic()
        was_here = self._workers.join(peer, hello)
        await self._workers.hub.send(peer, Welcome(core.epoch))
        logger.info("%s joined (pid %d)", hello.name, hello.pid)
        self._publisher.forget(hello.name)
        if hello.role == "rollout":
            self._updates.server_joined(hello.name)
            await self._act(core.rollout_joined(hello.name, hello.capacity, now))
            if (
                not was_here and 0 <= hello.serving <= core.version
            ):  # it took that version in, digests and all
                await self._act(core.serving(hello.name, hello.serving, now))
            self._updates.catch_up()
        elif hello.role == "reward":
            await self._act(core.reward_joined(hello.name, hello.capacity, now))
        else:
            core.trainer_joined(hello.leader)
            self._delivery.trainer_joined()
            self._updates.trainer_joined(hello)

    # ---- work

    async def _handle(self, name: str, message: AnyMessage) -> None:
        core, now = self._core, time.monotonic()
        if isinstance(message, Generated):
            await self._generated(name, message, now)
        elif isinstance(message, PartialSample):
            await self._act(core.interrupted(name, message))
        elif isinstance(message, GenerateFailed):
            logger.warning("%s: sample %s: %s", name, message.key, message.error)
            await self._act(core.generate_failed(name, message, now))
        elif isinstance(message, ScoreRequest):
            await self._act(core.asked(name, message, now))
        elif isinstance(message, ScoreResult):
            if message.reward is None:
                logger.warning("%s: no verdict on %s: %s", name, message.key, message.error)
            await self._act(core.scored(name, message, now))
        elif isinstance(message, GetBatch):
            self._delivery.wanted(now)
            await self._act(
                core.batch_wanted(self._workers[name].hello.leader, message.version, now)
            )
        elif isinstance(message, StepDone):
            await self._step_done(message)
        elif isinstance(message, CheckpointSaved):
            await self._saving.commit(message)
        elif isinstance(message, PublishOffer):
            self._updates.offered(name, message)
        elif isinstance(message, _PUBLISH_ANSWERS):
            self._updates.answered(name, message)
        elif isinstance(message, Failed):
            await self._failed(name, message)
        elif not isinstance(message, Heartbeat):
            raise ProtocolError(
                f"{name} sent {type(message).__name__}, which is not for the controller"
            )

    async def _generated(self, name: str, message: Generated, now: float) -> None:
        core = self._core
        core.last_fault = ""
        await self._act(core.generated(name, message, now))
        if core.last_fault:
            logger.error("%s", core.last_fault)
        else:
            self._progress.generated(message.sample)

    async def _step_done(self, message: StepDone) -> None:
        core, progress = self._core, self._progress
        is_new = message.version == core.version + 1
        await self._act(core.step_done(message.version, time.monotonic()))
        progress.ledger = core.ledger.table(core.pending)
        if is_new:
            progress.step_done(message.version, message.stats | self._lengths.step())
            self._lengths.check(progress.warn)
        else:
            progress.replayed(message.version, core.version)

    async def _failed(self, name: str, message: Failed) -> None:
        if not self._progress.training:
            raise Error(f"{name}: {message.error}")
        logger.error("%s: %s", name, message.error)
        await self._act(self._core.worker_lost(name, time.monotonic()))
