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

from megatron_async_rl.controller.weight_sync.session import Outcome, UpdateSession
from megatron_async_rl.errors import PublishError
from megatron_async_rl.protocol.messages import PublishOffer, Relabel, Updated


class Relabeler:
    """What the controller publishes by where there is no trainer: no groups, no folders."""

    def __init__(self, exchange: UpdateSession) -> None:
        self.exchange = exchange

    def start_generation(self, epoch: int) -> None:
        """Nothing: engines hold no groups of earlier lives."""

    def forget(self, name: str) -> None:
        """Nothing: no group has the worker in it."""

    async def publish(
        self,
        version: int,
        offers: dict[str, PublishOffer],
        servers: list[str],
        updating: Callable[[str], None],
    ) -> Outcome:
        exchange, sources, started = self.exchange, sorted(offers), time.monotonic()
        with exchange.update(version, sources, servers) as outcome:
            for server in servers:
                if server not in outcome.fenced:  # lost while the others were told
                    updating(server)
                    await exchange.send(server, Relabel(version))
            updated = await exchange.collect(Updated, servers, version=version)
            outcome.serving = sorted(updated)
        for message in updated.values():
            outcome.keep_slowest(message.seconds)
        outcome.seconds["total"] = time.monotonic() - started
        await exchange.release(version, sources)
        if not outcome.serving:
            raise PublishError(f"no server took version {version}: {outcome.fenced}")
        return outcome

    async def afterwards(self) -> None:
        """Nothing is left to do of an update when its servers serve."""
