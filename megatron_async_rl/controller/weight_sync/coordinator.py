"""When which servers get which weights; how an update goes is the publisher's, publisher.py.

the trainer offers v+1 after its step        -> the servers that lack it are updated
a server is there without weights, and the   -> Republish: the trainer offers what it has, once more, and goes on
trainer waits for a batch                       waiting
a trainer from a checkpoint offers an old v  -> Published(v, 0): nobody needs it
a server is behind, and a folder of weights  -> it loads that by itself (catch_up.py), and is in the next update again
that `eta` still allows is on the disk
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from megatron_async_rl.controller.core.actions import Action
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.fleet import RolloutWorker, ServerState
from megatron_async_rl.controller.journal.journal import Journal
from megatron_async_rl.controller.progress import Progress
from megatron_async_rl.controller.weight_sync.catch_up import CatchUp
from megatron_async_rl.controller.weight_sync.relabel import Relabeler
from megatron_async_rl.controller.weight_sync.snapshot import TrainerPublisher
from megatron_async_rl.controller.workers import Workers
from megatron_async_rl.errors import PublishError
from megatron_async_rl.protocol.messages import Hello, Message, Published, PublishOffer, Republish

logger = logging.getLogger(__name__)


class Updates:
    def __init__(
        self,
        core: Core,
        publisher: TrainerPublisher | Relabeler,
        catch_up: CatchUp,
        workers: Workers,
        journal: Journal,
        progress: Progress,
        last_version: int,
        act: Callable[[list[Action]], Awaitable[None]],
    ) -> None:
        self._core = core
        self._publisher = publisher
        self._catch_up = catch_up
        self._workers = workers
        self._journal = journal
        self._progress = progress
        self._last_version = last_version
        self._act = act
        self._offers: dict[str, PublishOffer] = {}  # by weight source
        self._offered = asyncio.Event()  # every source has offered
        self._republish_asked: frozenset[str] = frozenset()
        self._being_updated: frozenset[str] = frozenset()
        self._under_way: asyncio.Task[None] | None = None

    # ---- messages

    def offered(self, name: str, offer: PublishOffer) -> None:
        self._offers[name] = offer
        if len(self._offers) == offer.num_sources:
            self._offered.set()

    def answered(self, name: str, message: Message) -> None:
        """What a server or a weight source says in the course of an update."""
        if not self._catch_up.hear(name, message):
            self._publisher.exchange.inbox.put_nowait((name, message))

    def server_lost(self, name: str) -> None:
        """Whoever waits for it, waits no longer."""
        self._catch_up.forget(name)
        self._publisher.exchange.lost(name)

    def server_joined(self, name: str) -> None:
        self._republish_asked -= {name}

    def trainer_joined(self, hello: Hello) -> None:
        self._republish_asked = frozenset()
        self._offers.pop(hello.name, None)
        self._offered.clear()  # all are there again when this one has offered anew
        if self._under_way and hello.stage >= 0:
            self._under_way.cancel()  # it waits for what the old one had promised

    # ---- the loop's part

    async def next(self) -> int:
        """Waits for the trainer's next offers and brings the servers that lack them to these weights.

        Returns the version that the fleet is at then. A broken update is tried again by the trainer's next offer.
        """
        while True:
            await self._offered.wait()
            offers, self._offers = self._offers, {}
            self._offered.clear()
            version = min(offer.version for offer in offers.values())
            while (
                version >= self._core.version and not self._available()
            ):  # the trainer waits with us
                await (
                    self._catch_up.one_done()
                    if self._catch_up.is_busy()
                    else self._workers.one_more()
                )
            fleet = self._core.fleet.rollout.values()
            servers = [
                w.name for w in self._available() if not (w.is_serving and w.version >= version)
            ]
            if version < self._core.version or (not servers and any(w.is_serving for w in fleet)):
                for (
                    name
                ) in offers:  # a trainer on its way back to where it was, or nobody needs them
                    await self._workers.send(name, Published(version, 0))
                if version == self._core.version:
                    break
                continue
            await self._journal.durable()  # StepDone before anyone holds its weights
            self._under_way = asyncio.create_task(self._publish(version, offers, servers))
            try:
                await self._under_way
                break
            except PublishError as e:
                logger.error("the update to version %d failed: %s", version, e)
                self._republish_asked = frozenset()
                if version == self._last_version:
                    break  # the trainer has no further offer; only the last evaluation needed it
            except asyncio.CancelledError:
                ourselves = asyncio.current_task()
                if (ourselves and ourselves.cancelling()) or not self._under_way.cancelled():
                    raise  # the run ends; else it was trainer_joined, and the update alone that was cancelled
                logger.warning(
                    "the trainer came back during the update to version %d: waiting for its offer",
                    version,
                )
            finally:
                self._under_way = None
                self._core.hold_batches = False
        self._core.hold_batches = False
        await self._act(self._core.tick(time.monotonic()))
        return version

    def _available(self) -> list[RolloutWorker]:
        """Servers that an update can be given to."""
        fleet = self._core.fleet.rollout.values()
        return [
            worker
            for worker in fleet
            if not worker.reason and not self._catch_up.is_busy(worker.name)
        ]

    def catch_up(self) -> None:
        """Servers that no update is under way to take the newest folder in, where that helps."""
        self._catch_up.start(self._being_updated)

    async def ask_for_weights(self) -> None:
        """A server that came (back) while the trainer waits for a batch would otherwise get no weights."""
        core = self._core
        self.catch_up()
        if self._under_way or not core.batch_awaited or core.hold_batches:
            return
        available = self._available()
        nobody_is_up = not any(w.is_serving and w.version == core.version for w in available)
        without = (
            ServerState.STALE,
            ServerState.UPDATING,
        )  # the latter: of an update that came to nothing
        stale = frozenset(w.name for w in available if w.state in without or nobody_is_up)
        leaders = self._workers.leaders
        if stale <= self._republish_asked or not leaders:
            return
        self._republish_asked = stale
        core.hold_batches = True  # until the trainer is back from publishing
        for leader in leaders:  # experts may be with other replicas than the first
            await self._workers.send(leader.name, Republish(core.version))

    async def _publish(
        self, version: int, offers: dict[str, PublishOffer], servers: list[str]
    ) -> None:
        core = self._core
        lives = {
            name: core.fleet.rollout[name] for name in servers if name in core.fleet.rollout
        }  # not lost since
        self._being_updated = frozenset(lives)
        try:
            try:
                outcome = await self._publisher.publish(version, offers, list(lives), core.updating)
            finally:
                for name, reason in self._publisher.exchange.outcome.fenced.items():
                    await self._catch_up.fence(lives[name], reason)
            for name in outcome.serving:
                if core.fleet.rollout.get(name) is lives[name]:
                    await self._act(core.serving(name, version, time.monotonic()))
        finally:
            self._being_updated = frozenset()
        self._progress.published(outcome)
        await self._publisher.afterwards()
