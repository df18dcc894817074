"""Weight updates with run.mode = rollout_only: servers keep what they hold, which counts as the next version.

    recorder                     controller                     rollout workers
    PublishOffer(version) ----->
                                 Relabel(version)  ---------->  the engine labels tokens with it from now on
                       <-------  Published      <-------------  Updated

Requests are not interrupted: their tokens so far keep the label they were sampled under (SGLang >= 0.5.18; before, a
request has one label, that of its end).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_async_rl.controller.folders import FolderPublisher
from megatron_async_rl.controller.publisher import Outcome, keep_slowest
from megatron_async_rl.errors import PublishError
from megatron_async_rl.messages import Published, PublishOffer, Relabel, Updated


class Relabeler(FolderPublisher):
    """Writes no folders either."""

    async def publish(
        self, version: int, offers: dict[str, PublishOffer], servers: list[str], updating: Callable[[str], None]
    ) -> Outcome:
        sources = sorted(offers)
        self._sources = frozenset(sources)
        outcome = self.outcome = Outcome(version, [])
        started = time.monotonic()
        self._deadline = started + self._timeout_s
        for server in servers:
            updating(server)
            await self._send(server, Relabel(version))
        updated = await self._collect(Updated, servers, outcome, version=version)
        for message in updated.values():
            keep_slowest(outcome.seconds, message.seconds)
        outcome.serving = sorted(updated)
        outcome.seconds["total"] = time.monotonic() - started
        for source in sources:
            await self._send(source, Published(version, len(outcome.serving)))
        if not outcome.serving:
            raise PublishError(f"no server took version {version}: {outcome.fenced}")
        return outcome
