"""Measures the seconds and the GPU memory of a weight update."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds per phase: on a GPU by events in the current stream, elsewhere by the clock.

    On a GPU, work may still run when the call that started it returns; events are read at the end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._started = time.monotonic()
        self._clock: dict[str, float] = defaultdict(float)
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            self._before_bytes = torch.cuda.memory_allocated(device)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._on_gpu:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield
            pair[1].record()
            self._events[phase].append(pair)
            return
        started = time.monotonic()
        yield
        self._clock[phase] += time.monotonic() - started

    def elapsed(self) -> float:
        """Returns the seconds since the start, by the clock."""
        return time.monotonic() - self._started

    def seconds(self) -> dict[str, float]:
        """Returns seconds by phase, without GPU phases that have not ended (after an abort)."""
        gpu = {
            phase: sum(first.elapsed_time(last) for first, last in pairs) / 1000
            for phase, pairs in self._events.items()
            if all(last.query() for _, last in pairs)
        }
        return dict(self._clock) | gpu

    def peak_bytes(self) -> int:
        """Returns the peak of GPU memory less that in use at the start; 0 without a GPU."""
        if not self._on_gpu:
            return 0
        return torch.cuda.max_memory_allocated(self._device) - self._before_bytes
