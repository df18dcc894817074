"""One weight update over the network, as the controller sees it, for every version including 0:

    weight sources (weights/reshard.py)          controller                     rollout workers
    PublishOffer(version, buckets)  ------------>
                                                 UpdateWeights  ------------->  abort, pause
                                                 <-------------- UpdateReady  (late, failed: fenced)
                       <--------- OpenGroup      only if the membership changed:
    GroupOpened(address, port)  ---------------> JoinGroup  ----------------->  join
    GroupJoined  ------------------------------> <-------------- GroupJoined
                       <--------- SendBuckets    ReceiveBuckets  ------------>
    broadcast bucket 0, 1, ...  .............................................  load bucket 0, 1, ...
    BucketsSent(digests)  ---------------------> WeightDigests  ------------->  compare, resume
                       <--------- Published      <------------------ Updated    (mismatch: fenced)

Each attempt has one deadline for all its waits; no wait outlasts the loss of a server (session.py).
A failed server is fenced and never trusted. When a server fails during a broadcast, the sources are
told to stop (AbandonUpdate), which breaks the collective for the others: those that still reply get
a second attempt in new groups. Sources survive every server failure.
"""

from __future__ import annotations

import logging
import time

from megatron_async_rl.controller.weight_sync.session import Outcome, UpdateSession
from megatron_async_rl.errors import PublishError
from megatron_async_rl.protocol import weight_messages
from megatron_async_rl.protocol.weight_messages import PublishOffer

logger = logging.getLogger(__name__)


class BroadcastPublisher:
    """Runs updates over the network, one at a time."""

    def __init__(self, session: UpdateSession, engine_tp: int, verify_every: int) -> None:
        self.session = session
        self._engine_tp = engine_tp
        self._verify_every = verify_every
        self._members: tuple[str, ...] = ()  # of the groups: sources, then servers
        self._groups: list[str] = []
        self._num_formations = 0
        self._num_updates = 0
        self._suspects: set[str] = set()  # failed once in a broken collective; next time: fenced
        self._trusted: set[str] = set()  # took the last update; others are verified regardless

    def start_epoch(self, epoch: int) -> None:
        """Makes group names differ from those before a restart, which servers may still hold."""
        self._num_formations = epoch * 1_000_000

    def forget_worker(self, name: str) -> None:
        """Drops the groups that contain an earlier incarnation of this worker."""
        self._trusted.discard(name)
        if name in self._members:
            self.forget_groups()

    def forget_groups(self) -> None:
        """Makes the next update form new groups."""
        self._members = ()

    async def publish(
        self, version: int, offers: dict[str, PublishOffer], servers: list[str], hold: bool = False
    ) -> Outcome:
        """Updates `servers` to `version` with the offers by source name.

        Raises PublishError if no server took it. `hold`: does not release the sources on success.
        """
        with self.session.update(version, offers, servers) as outcome:
            try:
                await self._update(version, offers, servers)
            except PublishError:
                self.forget_groups()  # only some may have been opened
                await self.session.release()
                raise
        return await self.session.end(release=not (hold and outcome.serving))

    async def _update(
        self, version: int, offers: dict[str, PublishOffer], servers: list[str]
    ) -> None:
        session, outcome = self.session, self.session.outcome
        verify = self._num_updates % self._verify_every == 0
        verify = verify or not self._trusted.issuperset(servers)
        self._num_updates += 1
        await session.begin(servers, weight_messages.UpdateWeights(version))
        ready = await session.collect(weight_messages.UpdateReady, servers, version=version)
        outcome.add(ready.values())
        sources = sorted(offers, key=lambda name: offers[name].source)
        remaining = sorted(ready)
        self._suspects.clear()
        while remaining and not outcome.serving:
            num_failed = len(self._suspects) + len(outcome.fenced)
            session.start_clock()
            # everything that passes through new groups is verified
            verify = verify or self._members != (*sources, *remaining)
            if await self._form_groups(sources, remaining, offers):
                outcome.serving = await self._transfer(sources, remaining, offers, verify)
            if not outcome.serving:
                self.forget_groups()  # the collective is broken
                if len(self._suspects) + len(outcome.fenced) == num_failed:
                    break  # the sources failed: another attempt would end the same way
            remaining = [name for name in remaining if name not in outcome.fenced]
        self._trusted = set(outcome.serving)

    async def _form_groups(
        self, sources: list[str], servers: list[str], offers: dict[str, PublishOffer]
    ) -> bool:
        """Forms one update group per source, of it and all engine ranks, unless they exist."""
        if self._members == (*sources, *servers):
            return True
        session, outcome, started = self.session, self.session.outcome, time.monotonic()
        self._num_formations += 1
        self._groups = []
        world_size = 1 + self._engine_tp * len(servers)
        for source in sources:
            offer = offers[source]
            group = f"weights-{self._num_formations}-source{offer.source}"
            await session.send(source, weight_messages.OpenGroup(group, world_size))
            opened = await session.collect(weight_messages.GroupOpened, [source], group=group)
            if source not in opened:
                raise PublishError(
                    f"{source} did not open update group {group} within {session.timeout_s:.0f} s"
                )
            if not outcome.fenced.keys().isdisjoint(servers):
                return False  # one was lost: the group would never be complete
            where = opened[source].address, opened[source].port
            for index, server in enumerate(servers):
                rank = 1 + index * self._engine_tp
                await session.send(
                    server,
                    weight_messages.JoinGroup(group, *where, rank, world_size, offer.backend),
                )
            failed: dict[str, str] = {}  # maybe because another one never joined
            members = [source, *servers]
            joined = await session.collect(
                weight_messages.GroupJoined, members, failed, group=group
            )
            self._suspect(failed)
            if len(joined) < len(members) or joined[source].error:
                return False
            self._groups.append(group)
        self._members = (*sources, *servers)
        outcome.seconds["form_groups"] = time.monotonic() - started
        return True

    async def _transfer(
        self, sources: list[str], servers: list[str], offers: dict[str, PublishOffer], verify: bool
    ) -> list[str]:
        """Transfers the buckets, then the digests; returns the servers that serve the version.

        An empty list means that a source failed and the groups are broken.
        """
        session, outcome = self.session, self.session.outcome
        version = outcome.version
        stages = [
            weight_messages.StageBuckets(group, offers[source].buckets)
            for group, source in zip(self._groups, sources, strict=True)
        ]
        flattened = offers[sources[0]].flattened
        for server in servers:
            await session.send(
                server, weight_messages.ReceiveBuckets(version, stages, verify, flattened)
            )
        for source in sources:
            await session.send(source, weight_messages.SendBuckets(version, verify))
        failed: dict[str, str] = {}
        sent = await session.collect(
            weight_messages.BucketsSent, sources, failed, stop_with=servers, version=version
        )
        outcome.add(sent.values())
        digests: dict[str, str] = {}
        for reply in sent.values():
            digests |= reply.digests
            outcome.peak_bytes = max(outcome.peak_bytes, reply.peak_bytes)
        if missing := sorted(set(sources) - set(sent)):
            raise PublishError(f"weight sources {missing} did not send version {version}")
        if errors := {name: reply.error for name, reply in sent.items() if reply.error}:
            logger.warning("weight sources failed: %s", errors)
            # servers that received everything or report their failure stay; silent ones are fenced
            rest = [server for server in servers if server not in failed]
            for server in rest:
                await session.send(server, weight_messages.AbandonUpdate(version))
            await session.collect(weight_messages.UpdateReady, rest, failed, version=version)
            self._suspect(failed)
            return []
        outcome.fenced |= failed
        for server in servers:
            await session.send(server, weight_messages.WeightDigests(version, digests))
        updated = await session.collect(weight_messages.Updated, servers, version=version)
        outcome.add(updated.values())
        return sorted(updated)

    def _suspect(self, failed: dict[str, str]) -> None:
        """Fences the servers that failed in a broken collective for the second time."""
        fenced = {name: error for name, error in failed.items() if name in self._suspects}
        self.session.outcome.fenced |= fenced
        self._suspects |= failed.keys()
