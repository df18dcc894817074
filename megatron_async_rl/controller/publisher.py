"""One weight update, as the controller sees it. The whole exchange, for every version including 0:

    weight sources (weights/reshard.py)          controller                     rollout workers
    PublishOffer(version, buckets)  ------------>
                                                 UpdateWeights  ------------->  abort, pause
                                                 <-------------- UpdateReady    (late or failed: fenced)
                       <--------- OpenGroup      only when the membership changed:
    GroupOpened(address, port)  ---------------> JoinGroup  ----------------->  join
    GroupJoined  ------------------------------> <-------------- GroupJoined
                       <--------- SendBuckets    ReceiveBuckets  ------------>
    broadcast bucket 0, 1, ...  ..............................................  load bucket 0, 1, ...
    BucketsSent(digests)  ---------------------> WeightDigests  ------------->  compare, resume
                       <--------- Published      <------------------ Updated    (mismatch: fenced)

Every wait has the one deadline of the update. A server that fails is fenced, never trusted. When one breaks a
collective, the others fail with it: whoever still answers is given a second try in new groups. Sources stay alive
whatever happens to servers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_async_rl.errors import PublishError
from megatron_async_rl.messages import (
    AbandonUpdate,
    BucketsSent,
    GroupJoined,
    GroupOpened,
    JoinGroup,
    Message,
    OpenGroup,
    Published,
    PublishOffer,
    ReceiveBuckets,
    SendBuckets,
    StageBuckets,
    Updated,
    UpdateReady,
    UpdateWeights,
    WeightDigests,
)

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)


@dataclass
class Outcome:
    """What an update came to."""

    version: int
    serving: list[str]
    fenced: dict[str, str] = field(default_factory=dict)  # server -> why
    seconds: dict[str, float] = field(default_factory=dict)  # phase -> seconds of the slowest party
    num_interrupted: int = 0
    peak_bytes: int = 0  # GPU memory of the source that took most, beside its model


class Publisher:
    """Drives updates, one at a time. `send` and `inbox` are the controller's; names address workers."""

    def __init__(
        self, send: Callable[[str, Message], Awaitable[None]], engine_tp: int, timeout_s: float, verify_every: int
    ) -> None:
        self.inbox: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self._send = send
        self._engine_tp = engine_tp
        self._timeout_s = timeout_s
        self._verify_every = verify_every
        self._deadline = 0.0
        self._sources: frozenset[str] = frozenset()
        self._members: tuple[str, ...] = ()
        self._suspects: set[str] = set()  # servers that failed in a broken collective of this update: once is forgiven
        self._groups: list[str] = []
        self._num_formations = 0
        self._num_updates = 0
        self._trusted: set[str] = set()  # took the last update; anyone else proves what it holds, whatever verify_every
        self.outcome = Outcome(-1, [])  # of the last update, also of one that failed

    def begin_life(self, epoch: int) -> None:
        """Names of update groups differ from those of the controller's earlier lives: engines may still hold them."""
        self._num_formations = epoch * 1_000_000

    def forget(self, name: str) -> None:
        """A new life of this worker: groups with the old one in them are of no use."""
        self._trusted.discard(name)
        if name in self._members:
            self._members = ()

    async def publish(
        self, version: int, offers: dict[str, PublishOffer], servers: list[str], updating: Callable[[str], None]
    ) -> Outcome:
        """Brings `servers` to `version`. `offers` by source name. Raises PublishError when no server is left."""
        sources = sorted(offers, key=lambda name: offers[name].source)
        self._sources = frozenset(sources)
        outcome = self.outcome = Outcome(version, [])
        verify = self._num_updates % self._verify_every == 0 or not self._trusted.issuperset(servers)
        self._num_updates += 1
        started = time.monotonic()
        self._deadline = started + self._timeout_s
        for server in servers:
            updating(server)
            await self._send(server, UpdateWeights(version))
        ready = await self._collect(UpdateReady, servers, outcome, version=version)
        for message in ready.values():
            keep_slowest(outcome.seconds, message.seconds)
        remaining = sorted(ready)
        self._suspects.clear()
        while remaining and not outcome.serving:
            num_known = len(self._suspects) + len(outcome.fenced)
            self._deadline = time.monotonic() + self._timeout_s
            verify = verify or self._members != (*sources, *remaining)  # whatever goes through new groups is proved
            if await self._form_groups(sources, remaining, offers, outcome):
                outcome.serving = await self._transfer(version, sources, remaining, offers, verify, outcome)
            if not outcome.serving:
                self._members = ()  # the collective is broken: new groups, without whoever was fenced
                if len(self._suspects) + len(outcome.fenced) == num_known:
                    break  # the sources' own fault: another try would end the same way
            remaining = [name for name in remaining if name not in outcome.fenced]
        self._trusted = set(outcome.serving)
        await self._release(version, sources, outcome)
        if not outcome.serving:
            raise PublishError(f"no server took version {version}: {outcome.fenced}")
        outcome.seconds["total"] = time.monotonic() - started
        return outcome

    async def _release(self, version: int, sources: list[str], outcome: Outcome) -> None:
        """The sources' part is done."""
        for source in sources:
            await self._send(source, Published(version, len(outcome.serving)))

    def forget_groups(self) -> None:
        """A party was started anew under its old name: the next update makes new groups."""
        self._members = ()

    async def _form_groups(
        self, sources: list[str], servers: list[str], offers: dict[str, PublishOffer], outcome: Outcome
    ) -> bool:
        """One update group per source, of it and all engine ranks; kept while the membership is the same."""
        if self._members == (*sources, *servers):
            return True
        started = time.monotonic()
        self._num_formations += 1
        self._groups = []
        world_size = 1 + self._engine_tp * len(servers)
        for source in sources:
            offer = offers[source]
            group = f"weights-{self._num_formations}-source{offer.source}"
            await self._send(source, OpenGroup(group, world_size))
            opened = (await self._collect(GroupOpened, [source], outcome, group=group)).get(source)
            if opened is None:
                raise PublishError(f"{source} did not open update group {group} within {self._timeout_s:.0f} s")
            for index, server in enumerate(servers):
                await self._send(
                    server,
                    JoinGroup(
                        group, opened.address, opened.port, 1 + index * self._engine_tp, world_size, offer.backend
                    ),
                )
            victims: dict[str, str] = {}  # of one that never came: all wait for it in the same place
            joined = await self._collect(GroupJoined, [source, *servers], outcome, victims, group=group)
            outcome.fenced |= {name: error for name, error in victims.items() if name in self._suspects}
            self._suspects |= victims.keys()
            if len(joined) < 1 + len(servers) or joined[source].error:
                return False
            self._groups.append(group)
        self._members = (*sources, *servers)
        outcome.seconds["form_groups"] = time.monotonic() - started
        return True

    async def _transfer(
        self,
        version: int,
        sources: list[str],
        servers: list[str],
        offers: dict[str, PublishOffer],
        verify: bool,
        outcome: Outcome,
    ) -> list[str]:
        """Buckets over, digests after; the servers that serve `version` now. Empty: a source failed, start again."""
        stages = [
            StageBuckets(group, offers[source].buckets) for group, source in zip(self._groups, sources, strict=True)
        ]
        for server in servers:
            await self._send(server, ReceiveBuckets(version, stages, verify, offers[sources[0]].flattened))
        for source in sources:
            await self._send(source, SendBuckets(version, verify))
        failed: dict[str, str] = {}
        sent = await self._collect(BucketsSent, sources, outcome, failed, version=version)
        digests: dict[str, str] = {}
        for message in sent.values():
            digests.update(message.digests)
            keep_slowest(outcome.seconds, message.seconds)
            outcome.peak_bytes = max(outcome.peak_bytes, message.peak_bytes)
        if len(sent) < len(sources):
            raise PublishError(f"weight sources {sorted(set(sources) - set(sent))} did not send version {version}")
        if any(message.error for message in sent.values()):
            logger.warning("sources failed: %s", {name: m.error for name, m in sent.items() if m.error})
            await self._abandon(version, [s for s in servers if s not in failed], outcome, failed)
            outcome.fenced |= {name: error for name, error in failed.items() if name in self._suspects}
            self._suspects |= failed.keys()
            return []
        outcome.fenced |= failed
        for server in servers:
            if server not in outcome.fenced:
                await self._send(server, WeightDigests(version, digests))
        updated = await self._collect(Updated, servers, outcome, version=version)
        for message in updated.values():
            keep_slowest(outcome.seconds, message.seconds)
            outcome.num_interrupted += message.num_interrupted
        return sorted(updated)

    async def _abandon(self, version: int, servers: list[str], outcome: Outcome, failed: dict[str, str]) -> None:
        """Ends a broken try: servers that took everything in, or report their failure, stay; those that hang are fenced."""
        for server in servers:
            await self._send(server, AbandonUpdate(version))
        await self._collect(UpdateReady, servers, outcome, failed, version=version)

    async def _collect(
        self,
        kind: type[M],
        names: Collection[str],
        outcome: Outcome,
        failed: dict[str, str] | None = None,
        **match: Any,
    ) -> dict[str, M]:
        """The answers of that kind and for that version or group, by name, until the deadline.

        A server that answers not at all is fenced and left out, and one that answers with an error too, unless the caller
        gives `failed` for its error. A source's error is for the caller.
        """
        failed = outcome.fenced if failed is None else failed
        # who cannot join a group is at fault, unless its source gave up first
        at_fault = outcome.fenced if kind is GroupJoined else failed
        answers: dict[str, M] = {}
        waiting = {name for name in names if name not in outcome.fenced}
        while waiting:
            try:
                name, message = await asyncio.wait_for(self.inbox.get(), self._deadline - time.monotonic())
            except TimeoutError:
                for server in waiting - self._sources:
                    outcome.fenced[server] = (
                        f"no {kind.__name__} within weights.update_timeout_s = {self._timeout_s:.0f}"
                    )
                break
            if any(getattr(message, key, value) != value for key, value in match.items()):
                continue  # of an earlier update or group
            error = getattr(message, "error", "")
            if error and name in self._sources:
                at_fault = failed
            if error and name not in self._sources:
                at_fault[name] = error
                waiting.discard(name)
            elif name in waiting and isinstance(message, kind):
                answers[name] = message
                waiting.discard(name)
        return answers


def keep_slowest(into: dict[str, float], seconds: dict[str, float]) -> None:
    for phase, value in seconds.items():
        into[phase] = max(into.get(phase, 0.0), value)
