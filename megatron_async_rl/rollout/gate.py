"""Between the samples and the engine: requests pass while the gate is open, and are counted while they are out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Gate:
    """Shut until the engine holds weights that may be generated from, and while an update is under way."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._idle = asyncio.Condition()
        self.num_out = 0  # requests at the engine

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def open(self) -> None:
        self._open.set()

    def shut(self) -> None:
        self._open.clear()

    async def wait_open(self) -> None:
        await self._open.wait()

    @contextlib.asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around one request at the engine."""
        self.num_out += 1
        try:
            yield
        finally:
            self.num_out -= 1
            if not self.num_out:
                async with self._idle:
                    self._idle.notify_all()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether no request is out, which it waits for so long."""
        async with self._idle:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait_for(lambda: not self.num_out), timeout_s)
        return not self.num_out
