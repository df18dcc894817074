"""How the requests in flight are stopped for a weight update, and what becomes of their KV cache.

| settings                      | requests in flight                                 | KV cache                          | SGLang    |
|-------------------------------|----------------------------------------------------|-----------------------------------|-----------|
| interrupt abort, recompute    | come back with their tokens, are sent again        | all of it dropped                 | any       |
| interrupt retract, recompute  | stay in the engine's queue, are prefilled again    | all of it dropped                 | >= 0.5.21 |
| kv_cache keep                 | freeze where they are and go on                    | theirs and the prefixes' are kept | >= 0.5.21 |

Abort waits for every answer: the engine takes no weights before (it holds a lock). Paused, it takes them at once. What
retract gives up: the tokens of requests in flight are the engine's alone, and a server that dies takes them with it.
What keep gives up: tokens after the update are sampled on KV of older weights. Each token is labelled with the weights
that sampled it, and a prefix in the cache is found only by requests sent under the same weights (`cache_key`).

With retract the engine goes by its own word that nothing of the old weights is left: it frees the KV of all it
retracts, and drops the prefix cache with the last bucket (0.5.16 to 0.5.20 refuse that while requests are queued).
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal, Protocol

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError, EngineError
from megatron_async_rl.rollout.engine_client import EngineClient
from megatron_async_rl.rollout.gate import Gate

ABORT_AGAIN_S = (
    0.05  # a request on its way to the scheduler escapes an abort: repeat until none is out
)
OLDEST_THAT_PAUSES = (0, 5, 21)


class Interruption(Protocol):
    flushes: bool  # the prefix cache is to be dropped
    freezes: (
        bool  # once stopped nothing runs in the engine, not even what nobody waits for any more
    )
    seconds: dict[str, float]  # by phase, of the last one

    async def stop(self) -> None:
        """The gate is shut. When this returns the update may begin. Raises EngineError."""

    async def stopped(self) -> None:
        """Returns when nothing of the engine's is in the way of a flush. Raises EngineError."""

    async def resume(self) -> None:
        """The engine holds the new weights; the gate is opened next. Raises EngineError."""

    def cache_key(self) -> str | None:
        """Requests share a cached prefix only with those of the same key."""


class Abort:
    """All requests come back with what they have; their KV cache is freed with them."""

    flushes = True
    freezes = False

    def __init__(self, client: EngineClient, gate: Gate, patience_s: float) -> None:
        self._client = client
        self._gate = gate
        self._patience_s = patience_s
        self._drain: asyncio.Task[None] | None = None
        self.seconds: dict[str, float] = {}

    async def stop(self) -> None:
        started = time.monotonic()
        if self._gate.num_out:
            await self._client.abort_all()
        self.seconds = {"interrupt": time.monotonic() - started}
        # the last answers come in while the update begins
        self._drain = asyncio.create_task(self._until_idle(started))
        self._drain.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # `stopped` may never ask

    async def stopped(self) -> None:
        if self._drain is not None:
            await self._drain

    async def resume(self) -> None:
        pass

    def cache_key(self) -> str | None:
        return None

    async def _until_idle(self, started: float) -> None:
        while not await self._gate.wait_idle(ABORT_AGAIN_S):
            if time.monotonic() > started + self._patience_s:
                raise EngineError(f"{self._gate.num_out} requests did not end after an abort")
            await self._client.abort_all()
        self.seconds["drain"] = time.monotonic() - started


class Pause:
    """Requests stay in the engine: queued again without their KV cache (retract), or as they are (in_place)."""

    freezes = True

    def __init__(self, client: EngineClient, mode: Literal["retract", "in_place"]) -> None:
        self.flushes = mode == "retract"
        self._client = client
        self._mode = mode
        self._paused = False
        self._num_resumed = 0
        self.seconds: dict[str, float] = {}

    async def stop(self) -> None:
        started = time.monotonic()
        await self._client.pause(self._mode)
        self._paused = True
        self.seconds = {"interrupt": time.monotonic() - started}

    async def stopped(self) -> None:
        pass

    async def resume(self) -> None:
        self._num_resumed += 1
        if self._paused:
            await self._client.resume()
            self._paused = False

    def cache_key(self) -> str | None:
        # not the version: a run that goes back to a checkpoint makes other weights of the same version
        return None if self.flushes else f"weights-{self._num_resumed}"


def interruption(config: Config, client: EngineClient, gate: Gate) -> Interruption:
    """As `weights.interrupt` and `weights.kv_cache` say. Raises ConfigError when this SGLang cannot do it."""
    weights = config.weights
    keep = weights.kv_cache == "keep"
    if not keep and weights.interrupt == "abort":
        return Abort(client, gate, config.rollout.request_timeout_s)
    if client.version < OLDEST_THAT_PAUSES:
        needed, found = (
            ".".join(map(str, version)) for version in (OLDEST_THAT_PAUSES, client.version)
        )
        setting = "weights.kv_cache = keep" if keep else "weights.interrupt = retract"
        why = (
            "a token could be labelled with weights that did not sample it"
            if keep
            else "it cannot drop the prefixes of the old weights while requests are queued"
        )
        raise ConfigError(
            f"{setting} needs SGLang {needed} or newer, this is {found}: {why}; install a newer one in the engine's "
            "environment, or set weights.kv_cache=recompute weights.interrupt=abort"
        )
    return Pause(client, "in_place" if keep else "retract")
