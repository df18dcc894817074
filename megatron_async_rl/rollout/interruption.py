"""How a weight update interrupts the requests in flight, and whether their KV cache is kept.

| settings                     | requests in flight                   | KV cache      | SGLang    |
|------------------------------|--------------------------------------|---------------|-----------|
| interrupt finish             | end under the old weights            | freed         | any       |
| interrupt abort, recompute   | return their tokens, are sent again  | dropped       | any       |
| interrupt retract, recompute | are queued again and prefilled again | dropped       | >= 0.5.21 |
| kv_cache keep                | freeze, then continue                | kept          | >= 0.5.21 |

finish: the update begins when the last request has ended; a next turn waits for it at the gate.
    No call of `policy.generate` has tokens of two versions.
abort: the server accepts weights only once all requests have returned (it holds a lock).
retract: the server accepts weights at once, but holds the only copy of the tokens of requests in
    flight: if it dies, they are lost. It frees the KV cache of all retracted requests and flushes
    the prefix cache with the last bucket, so nothing of the old weights is left (0.5.16 to 0.5.20
    refuse to flush while requests are queued).
keep: cached prefixes are kept too. Tokens after the update are sampled on KV of older weights. Each
    token is labelled with the version that sampled it; a cached prefix is shared only under the
    same weights (`cache_key`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import EngineError
from megatron_async_rl.rollout.engine_client import EngineClient
from megatron_async_rl.rollout.gate import Gate

ABORT_INTERVAL_S = 0.05  # an abort misses requests on their way to the scheduler, so it is repeated
FINISH_SHARE = 0.9  # of weights.update_timeout_s: the error must arrive before the controller's own


class Interruption:
    """Called by weight_update.py in the order stop, wait_drained, resume; all raise EngineError."""

    interrupts = True  # requests in flight continue after the update
    flushes_cache = True  # the update must drop the prefix cache
    freezes = False  # after `stop` the server runs nothing, not even aborted requests

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # of the last interruption, by phase

    async def stop(self) -> None:
        """Stops or ends the requests in flight after the gate was closed.

        Then the update may begin.
        """
        raise NotImplementedError

    async def wait_drained(self) -> None:
        """Waits until no request in flight prevents a flush."""

    async def resume(self) -> None:
        """Continues on the new weights, before the gate opens."""

    def cache_key(self) -> str | None:
        """Returns the key within which requests share cached prefixes."""
        return None


class Finish(Interruption):
    """All requests end regularly; meanwhile the server gets no new ones."""

    interrupts = False

    def __init__(self, gate: Gate, timeout_s: float) -> None:
        super().__init__()
        self._gate, self._timeout_s = gate, timeout_s

    async def stop(self) -> None:
        started = time.monotonic()
        if not await self._gate.wait_idle(FINISH_SHARE * self._timeout_s):
            raise EngineError(
                f"with weights.interrupt = finish {self._gate.num_in_flight} requests did not end "
                f"within {FINISH_SHARE:g} of weights.update_timeout_s = {self._timeout_s:g}; set "
                "it to more than the longest request takes, or set weights.interrupt=abort"
            )
        self.seconds = {"drain": time.monotonic() - started}


class Abort(Interruption):
    """All requests return the tokens they have; their KV cache is freed."""

    def __init__(self, client: EngineClient, gate: Gate, timeout_s: float) -> None:
        super().__init__()
        self._client, self._gate, self._timeout_s = client, gate, timeout_s
        self._drain: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        started = time.monotonic()
        if self._gate.num_in_flight:
            await self._client.abort_all()
        self.seconds = {"interrupt": time.monotonic() - started}
        # the last requests return while the update begins
        self._drain = asyncio.create_task(self._abort_until_idle(started))
        # marks its exception as retrieved: an update that fails earlier never awaits it
        self._drain.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def wait_drained(self) -> None:
        if self._drain is not None:
            await self._drain

    async def _abort_until_idle(self, started: float) -> None:
        while not await self._gate.wait_idle(ABORT_INTERVAL_S):
            if time.monotonic() > started + self._timeout_s:
                num_left = self._gate.num_in_flight
                raise EngineError(
                    f"{num_left} requests still run {self._timeout_s:g} s after an abort"
                )
            await self._client.abort_all()
        self.seconds["drain"] = time.monotonic() - started


class Pause(Interruption):
    """Requests stay in the server, queued without their KV cache (retract) or frozen (in_place)."""

    freezes = True

    def __init__(self, client: EngineClient, mode: Literal["retract", "in_place"]) -> None:
        super().__init__()
        self.flushes_cache = mode == "retract"
        self._client, self._mode = client, mode
        self._paused = False
        self._num_resumed = 0

    async def stop(self) -> None:
        started = time.monotonic()
        await self._client.pause(self._mode)
        self._paused = True
        self.seconds = {"interrupt": time.monotonic() - started}

    async def resume(self) -> None:
        self._num_resumed += 1
        if self._paused:
            await self._client.resume()
            self._paused = False

    def cache_key(self) -> str | None:
        # not the version: after a return to a checkpoint, other weights have the same version
        return None if self.flushes_cache else f"weights-{self._num_resumed}"


def make_interruption(config: Config, client: EngineClient, gate: Gate) -> Interruption:
    """Follows `weights.interrupt` and `weights.kv_cache`."""
    keep = config.weights.kv_cache == "keep"
    if config.weights.interrupt == "finish":
        return Finish(gate, config.weights.update_timeout_s)
    if not keep and config.weights.interrupt == "abort":
        return Abort(client, gate, config.rollout.request_timeout_s)
    return Pause(client, "in_place" if keep else "retract")
