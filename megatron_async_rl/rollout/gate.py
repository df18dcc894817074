"""Holds back requests to the server during weight updates and counts those in flight."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Gate:
    """Open while the server holds verified weights and no update is in progress."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._idle = asyncio.Condition()
        self.num_in_flight = 0

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    @contextlib.asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Waits until the gate is open, and counts a request as in flight within the context.

        No request passes a gate that was closed again while it waited.
        """
        while not self.is_open:
            await self._open.wait()
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1
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
