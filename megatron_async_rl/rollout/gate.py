"""Holds back requests to the server during weight updates and counts those in flight."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator


class Gate:
    """Open while the server holds verified weights and no update is in progress."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._idle = asyncio.Condition()
        self.num_in_flight = 0
        self._is_frozen = False
        self._idle_s = 0.0
        self._counted_at: float | None = time.monotonic()  # None while the server works

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    @property
    def idle_s(self) -> float:
        """Seconds since the start in which the server generated nothing, for any reason."""
        self._count_idle()
        return self._idle_s

    def open(self) -> None:
        self._is_frozen = False
        self._count_idle()
        self._open.set()

    def close(self, freezes: bool = False) -> None:
        """`freezes`: requests in flight stay in the server, which does not work on them."""
        self._open.clear()
        self._is_frozen = freezes
        self._count_idle()

    def _count_idle(self) -> None:
        now = time.monotonic()
        if self._counted_at is not None:
            self._idle_s += now - self._counted_at
        self._counted_at = now if self._is_frozen or not self.num_in_flight else None

    @contextlib.asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Waits until the gate is open, and counts a request as in flight within the context.

        No request passes a gate that was closed again while it waited.
        """
        while not self.is_open:
            await self._open.wait()
        self.num_in_flight += 1
        self._count_idle()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            self._count_idle()
            if not self.num_in_flight:
                async with self._idle:
                    self._idle.notify_all()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no request is in flight. Returns False if some are left after `timeout_s`."""
        async with self._idle:
            with contextlib.suppress(TimeoutError):
                is_idle = self._idle.wait_for(lambda: not self.num_in_flight)
                await asyncio.wait_for(is_idle, timeout_s)
        return not self.num_in_flight
