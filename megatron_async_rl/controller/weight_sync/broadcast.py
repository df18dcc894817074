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

Every wait has the one deadline of its try, and ends when who is waited for is lost (exchange.py). A server that fails is
fenced, never trusted. When one breaks a collective, the others fail with it: whoever still answers is given a second try
in new groups. Sources stay alive whatever happens to servers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from megatron_async_rl.controller.weight_sync.session import Outcome, UpdateSession
from megatron_async_rl.errors import PublishError
from megatron_async_rl.protocol.messages import (
    AbandonUpdate,
    BucketsSent,
    GroupJoined,
    GroupOpened,
    JoinGroup,
    OpenGroup,
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


class BroadcastPublisher:
    """Drives updates over the network, one at a time."""

    def __init__(self, exchange: UpdateSession, engine_tp: int, verify_every: int) -> None:
        self.exchange = exchange
        self._engine_tp = engine_tp
        self._verify_every = verify_every
        self._members: tuple[str, ...] = ()
        self._suspects: set[str] = (
            set()
        )  # servers that failed in a broken collective of this update: once is forgiven
        self._groups: list[str] = []
        self._num_formations = 0
        self._num_updates = 0
        self._trusted: set[str] = (
            set()
        )  # took the last update; anyone else proves what it holds, whatever verify_every

    def start_generation(self, epoch: int) -> None:
        """Names of update groups differ from those of the controller's earlier lives: engines may still hold them."""
        self._num_formations = epoch * 1_000_000

    def forget(self, name: str) -> None:
        """A new life of this worker: groups with the old one in them are of no use."""
        self._trusted.discard(name)
        if name in self._members:
            self._members = ()

    def forget_groups(self) -> None:
        """A party was started anew under its old name: the next update makes new groups."""
        self._members = ()

    async def publish(
        self,
        version: int,
        offers: dict[str, PublishOffer],
        servers: list[str],
        updating: Callable[[str], None],
        hold: bool = False,
    ) -> Outcome:
        """Brings `servers` to `version`. `offers` by source name. Raises PublishError when no server is left.

        `hold`: the sources are not released if it works, the caller needs them further.
        """
        sources = sorted(offers, key=lambda name: offers[name].source)
        with self.exchange.update(version, sources, servers) as outcome:
            started = time.monotonic()
            await self._bring(version, sources, servers, offers, updating, outcome)
        if not (hold and outcome.serving):
            await self.exchange.release(version, sources)
        if not outcome.serving:
            raise PublishError(f"no server took version {version}: {outcome.fenced}")
        outcome.seconds["total"] = time.monotonic() - started
        return outcome

    async def _bring(
        self,
        version: int,
        sources: list[str],
        servers: list[str],
        offers: dict[str, PublishOffer],
        updating: Callable[[str], None],
        outcome: Outcome,
    ) -> None:
        verify = self._num_updates % self._verify_every == 0 or not self._trusted.issuperset(
            servers
        )
        self._num_updates += 1
        for server in servers:
            if server not in outcome.fenced:  # lost while the others were told
                updating(server)
                await self.exchange.send(server, UpdateWeights(version))
        ready = await self.exchange.collect(UpdateReady, servers, version=version)
        for message in ready.values():
            outcome.keep_slowest(message.seconds)
        remaining = sorted(ready)
        self._suspects.clear()
        while remaining and not outcome.serving:
            num_known = len(self._suspects) + len(outcome.fenced)
            self.exchange.start_clock()
            verify = verify or self._members != (
                *sources,
                *remaining,
            )  # whatever goes through new groups is proved
            if await self._form_groups(sources, remaining, offers, outcome):
                outcome.serving = await self._transfer(
                    version, sources, remaining, offers, verify, outcome
                )
            if not outcome.serving:
                self._members = ()  # the collective is broken: new groups, without whoever was fenced
                if len(self._suspects) + len(outcome.fenced) == num_known:
                    break  # the sources' own fault: another try would end the same way
            remaining = [name for name in remaining if name not in outcome.fenced]
        self._trusted = set(outcome.serving)

    async def _form_groups(
        self,
        sources: list[str],
        servers: list[str],
        offers: dict[str, PublishOffer],
        outcome: Outcome,
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
            await self.exchange.send(source, OpenGroup(group, world_size))
            opened = (await self.exchange.collect(GroupOpened, [source], group=group)).get(source)
            if opened is None:
                raise PublishError(
                    f"{source} did not open update group {group} within {self.exchange.timeout_s:.0f} s"
                )
            if not outcome.fenced.keys().isdisjoint(servers):
                return False  # one was lost: without it the group would never be full
            for index, server in enumerate(servers):
                await self.exchange.send(
                    server,
                    JoinGroup(
                        group,
                        opened.address,
                        opened.port,
                        1 + index * self._engine_tp,
                        world_size,
                        offer.backend,
                    ),
                )
            victims: dict[
                str, str
            ] = {}  # of one that never came: all wait for it in the same place
            joined = await self.exchange.collect(
                GroupJoined, [source, *servers], victims, group=group
            )
            outcome.fenced |= {
                name: error for name, error in victims.items() if name in self._suspects
            }
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
            StageBuckets(group, offers[source].buckets)
            for group, source in zip(self._groups, sources, strict=True)
        ]
        for server in servers:
            await self.exchange.send(
                server, ReceiveBuckets(version, stages, verify, offers[sources[0]].flattened)
            )
        for source in sources:
            await self.exchange.send(source, SendBuckets(version, verify))
        failed: dict[str, str] = {}
        sent = await self.exchange.collect(BucketsSent, sources, failed, version=version)
        digests: dict[str, str] = {}
        for message in sent.values():
            digests.update(message.digests)
            outcome.keep_slowest(message.seconds)
            outcome.peak_bytes = max(outcome.peak_bytes, message.peak_bytes)
        if len(sent) < len(sources):
            raise PublishError(
                f"weight sources {sorted(set(sources) - set(sent))} did not send version {version}"
            )
        if any(message.error for message in sent.values()):
            logger.warning(
                "sources failed: %s", {name: m.error for name, m in sent.items() if m.error}
            )
            await self._abandon(version, [s for s in servers if s not in failed], failed)
            outcome.fenced |= {
                name: error for name, error in failed.items() if name in self._suspects
            }
            self._suspects |= failed.keys()
            return []
        outcome.fenced |= failed
        for server in servers:
            await self.exchange.send(server, WeightDigests(version, digests))
        updated = await self.exchange.collect(Updated, servers, version=version)
        for message in updated.values():
            outcome.keep_slowest(message.seconds)
            outcome.num_interrupted += message.num_interrupted
        return sorted(updated)

    async def _abandon(self, version: int, servers: list[str], failed: dict[str, str]) -> None:
        """Ends a broken try: servers that took everything in, or report their failure, stay; those that hang are fenced."""
        for server in servers:
            await self.exchange.send(server, AbandonUpdate(version))
        await self.exchange.collect(UpdateReady, servers, failed, version=version)
