"""Measures of a simulated training step, from the end of the step before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_async_rl.planning.server import Request, Server


@dataclass(frozen=True)
class Step:
    seconds: float
    wait_s: float
    proximal_s: float
    train_s: float
    trained_tokens: int
    generated_tokens: float
    mean_staleness: float  # over the trained tokens
    max_staleness: int
    server_idle: float  # fraction of the servers' time
    kv_use: float  # mean over the servers, at the end of the step


class StepMeter:
    """Measures the servers' work between the ends of steps."""

    def __init__(self, servers: list[Server]) -> None:
        self._servers = servers
        self._now = self._busy_s = self._generated_tokens = 0.0

    def end_step(
        self,
        now: float,
        requests: Sequence[Request],
        version: int,
        wait_s: float,
        train_s: tuple[float, float],
    ) -> Step:
        """Returns the step that trained `requests` on `version`; `train_s`: proximal, training."""
        for server in self._servers:
            server.advance(now)
        busy_s = sum(server.busy_s for server in self._servers)
        generated = sum(server.generated_tokens for server in self._servers)
        seconds, count = now - self._now, len(self._servers)
        trained = sum(request.response_tokens for request in requests)
        lags = [(version - v, tokens) for request in requests for v, tokens in request.versions]
        step = Step(
            seconds=seconds,
            wait_s=wait_s,
            proximal_s=train_s[0],
            train_s=train_s[1],
            trained_tokens=trained,
            generated_tokens=generated - self._generated_tokens,
            mean_staleness=sum(lag * tokens for lag, tokens in lags) / trained,
            max_staleness=max(lag for lag, _ in lags),
            server_idle=1 - (busy_s - self._busy_s) / (seconds * count),
            kv_use=sum(server.kv_use for server in self._servers) / count,
        )
        self._now, self._busy_s, self._generated_tokens = now, busy_s, generated
        return step
