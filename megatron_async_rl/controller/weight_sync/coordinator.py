"""Decides which servers get which weights, and when; the publishers run each update.

the trainer offers v+1 after its step          -> the servers that lack it are updated
a server has no weights while the trainer      -> Republish: the trainer offers its weights again
waits for a batch                                 and continues to wait; again to a leader that
                                                  repeats its request instead
a trainer from a checkpoint offers an older v  -> Published(v, 0): no server needs it
a server is behind, and a snapshot on disk is  -> it loads the snapshot by itself (catch_up.py) and
within max_staleness                              takes part in the next update
a server is held for an evaluation             -> no update includes it until it is released
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from megatron_async_rl.controller.context import Context
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.fleet import RolloutWorker, ServerState
from megatron_async_rl.controller.weight_sync.catch_up import CatchUp
from megatron_async_rl.controller.weight_sync.session import RelabelPublisher
from megatron_async_rl.controller.weight_sync.snapshot import TrainerPublisher
from megatron_async_rl.errors import PublishError
from megatron_async_rl.protocol.messages import Hello, Message, Republish
from megatron_async_rl.protocol.weight_messages import Published, PublishOffer

logger = logging.getLogger(__name__)


class UpdateCoordinator:
    """`next` belongs to the conductor task, all other methods to the controller's loop.

    `allow_update`: waits for an evaluation that the update to this version would disturb.
    """

    def __init__(
        self,
        context: Context,
        publisher: TrainerPublisher | RelabelPublisher,
        catch_up: CatchUp,
        allow_update: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        self._context = context
        self._core = context.core
        self._workers = context.workers
        self._publisher = publisher
        self._catch_up = catch_up
        self._offers: dict[str, PublishOffer] = {}  # by weight source
        self._all_offered = asyncio.Event()
        self._taken: dict[str, int] = {}  # version of the last offer that `next` took, by source
        self._is_busy = False  # with these
        self._repeated: dict[str, int] = {}  # those that a source repeats after their answer
        self._unheard: set[str] = set()  # leaders that repeat their request, unaware of Republish
        self._num_joined_sources = 0
        self._requested_for: frozenset[str] = frozenset()  # servers that caused a Republish
        self._being_updated: frozenset[str] = frozenset()
        self._running: asyncio.Task[None] | None = None
        self._allow_update = allow_update

    @property
    def is_idle(self) -> bool:
        """True while no weight source has an offer that is not served yet."""
        return not self._is_busy and not self._offers

    # ---- reports of the loop

    def offered(self, name: str, offer: PublishOffer) -> None:
        """Takes an offer, unless it repeats one that was taken."""
        if self._taken.get(name) == offer.version:
            if not self._is_busy:
                self._repeated[name] = offer.version
            return
        self._offers[name] = offer
        self._check_offers()

    def step_reported(self) -> None:
        """Takes offers that came before the report of their step, which was sent first."""
        self._check_offers()

    def _check_offers(self) -> None:
        offers = self._offers.values()
        if any(offer.version > self._core.version for offer in offers):
            return  # the report was lost with its connection: the trainer repeats it
        if offers and len(offers) == max(offer.num_sources for offer in offers):
            self._all_offered.set()

    def request_repeated(self, name: str) -> None:
        """Notes that this leader requests its batch again; it has no answer yet."""
        self._unheard.add(name)

    def replied(self, name: str, message: Message) -> None:
        """Hands over a reply of a server or a weight source during an update."""
        if not self._catch_up.replied(name, message):
            self._publisher.session.inbox.put_nowait((name, message))

    def server_lost(self, name: str) -> None:
        """Ends every wait for this server."""
        self._catch_up.forget(name)
        self._publisher.session.lost(name)

    def worker_joined(self, hello: Hello) -> None:
        self._publisher.forget_worker(hello.name)
        if hello.role == "rollout":
            self._requested_for -= {hello.name}
        elif hello.role == "trainer":
            self._requested_for = frozenset()
            self._taken.pop(hello.name, None)
            self._repeated.pop(hello.name, None)
            if self._offers.pop(hello.name, None):
                self._all_offered.clear()  # until this source has offered again
            self._num_joined_sources += hello.stage >= 0
            if self._running and hello.stage >= 0:
                self._running.cancel()  # it waits for replies of the earlier incarnation

    def start_catch_up(self) -> None:
        """Starts to catch up all servers that need it and are not in the running update."""
        self._catch_up.start(self._being_updated)

    async def answer_again(self) -> None:
        """Sends messages again that a connection which broke has lost, if this is seen from a
        repeated offer or request."""
        repeated, self._repeated = self._repeated, {}
        for name, version in repeated.items():
            await self._workers.send(name, Published(version, 0))
        unheard, self._unheard = self._unheard, set()
        if self._is_busy:
            return
        if self._core.batches_held:
            for name in sorted(unheard - self._offers.keys()):
                await self._workers.send(name, Republish(self._core.version))
        elif not self._all_offered.is_set():
            await self._release_late_sources()

    async def _release_late_sources(self) -> None:
        """Answers sources that no server needs, without waiting for the other sources.

        An earlier controller was killed while it told all that the update is over.
        """
        servers = self._core.fleet.rollout.values()
        served = max((server.version for server in servers if server.is_serving), default=-1)
        for name, offer in list(self._offers.items()):
            if offer.version <= served or offer.version < self._core.version:
                del self._offers[name]
                await self._workers.send(name, Published(offer.version, 0))

    def must_republish(self) -> bool:
        """Returns whether the trainer, which waits for a batch, must offer its weights again.

        True once per set of servers that need them; the loop then holds the batches and asks.
        """
        core = self._core
        if self._running or not core.batch_awaited or core.batches_held or core.draining:
            return False
        available = self._available()
        none_is_current = not any(w.is_serving and w.version == core.version for w in available)
        no_weights = (ServerState.STALE, ServerState.UPDATING)  # UPDATING: the update failed
        stale = frozenset(w.name for w in available if w.state in no_weights or none_is_current)
        if stale <= self._requested_for or not self._workers.leaders:
            return False
        self._requested_for = stale
        self._taken.clear()
        return True

    # ---- updates

    async def next(self) -> int:
        """Waits for the trainer's next offers and updates the servers that lack that version.

        Returns the version of the fleet. After a failed update it waits for the next offer.
        """
        done = False
        while not done:
            offers, num_joined = await self._next_offers(), self._num_joined_sources
            version = min(offer.version for offer in offers.values())
            if self._allow_update:
                await self._allow_update(version)
            servers = await self._servers_without(version)
            is_needed = self._is_needed(version, servers)
            if is_needed:
                await self._context.journal.durable()  # StepDone, before any server has the weights
            if self._num_joined_sources != num_joined:
                logger.warning("the trainer restarted: its offer of version %d is void", version)
                self._taken.clear()  # sources that have not joined again repeat their offer
                continue
            if is_needed:
                done = await self._run_update(version, offers, servers)
            else:
                for name in offers:
                    await self._workers.send(name, Published(version, 0))
                done = version == self._core.version
            self._is_busy = False
            if is_needed or done:
                await self._context.queue.submit(inputs.BatchesHeld(False))
        return version

    async def _next_offers(self) -> dict[str, PublishOffer]:
        self._is_busy = False
        while not self._all_offered.is_set():  # a source may rejoin before this task continues
            await self._all_offered.wait()
        self._is_busy = True
        self._all_offered.clear()
        offers, self._offers = self._offers, {}
        self._taken = {name: offer.version for name, offer in offers.items()}
        return offers

    async def _servers_without(self, version: int) -> list[str]:
        """Returns the available servers that lack `version`; waits until one is available."""
        while version >= self._core.version and not self._available():
            if self._catch_up.is_busy():
                await self._catch_up.one_done()
            else:
                await self._workers.one_more()
        return [w.name for w in self._available() if not (w.is_serving and w.version >= version)]

    def _is_needed(self, version: int, servers: list[str]) -> bool:
        """False for a trainer that repeats its steps, or if all servers have the version."""
        is_served = any(server.is_serving for server in self._core.fleet.rollout.values())
        return version >= self._core.version and (bool(servers) or not is_served)

    async def _run_update(
        self, version: int, offers: dict[str, PublishOffer], servers: list[str]
    ) -> bool:
        """Returns False if the trainer must offer its weights once more."""
        self._running = asyncio.create_task(self._update(version, offers, servers))
        try:
            await self._running
            return True
        except PublishError as e:
            logger.error("the update to version %d failed: %s", version, e)
            self._requested_for = frozenset()
            self._taken.clear()
            # after the last step no offer follows; only the final evaluation needed this one
            return version == self._core.settings.steps
        except asyncio.CancelledError:
            conductor = asyncio.current_task()
            if (conductor and conductor.cancelling()) or not self._running.cancelled():
                raise  # the run ends; otherwise worker_joined cancelled this update alone
            logger.warning(
                "the trainer restarted during the update to version %d: waiting for its next offer",
                version,
            )
            self._taken.clear()  # see `next`
            return False
        finally:
            self._running = None

    async def _update(
        self, version: int, offers: dict[str, PublishOffer], servers: list[str]
    ) -> None:
        fleet, submit = self._core.fleet.rollout, self._context.queue.submit
        incarnations = {name: fleet[name].incarnation for name in servers if name in fleet}
        self._being_updated = frozenset(incarnations)
        try:
            try:
                outcome = await self._publisher.publish(version, offers, list(incarnations))
            finally:
                for name, reason in self._publisher.session.outcome.fenced.items():
                    await submit(inputs.ServerFenced(name, incarnations[name], reason=reason))
            for name in outcome.serving:
                await submit(inputs.ServerUpdated(name, incarnations[name], version=version))
        finally:
            self._being_updated = frozenset()
        self._context.progress.published(outcome)
        await self._publisher.finish()

    def _available(self) -> list[RolloutWorker]:
        """Returns the servers that an update can be given to."""
        return [
            server
            for server in self._core.fleet.rollout.values()
            if not (server.is_fenced or server.is_held or self._catch_up.is_busy(server.name))
        ]
