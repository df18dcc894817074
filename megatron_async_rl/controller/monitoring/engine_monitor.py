"""Figures that servers report in heartbeats: means per step, and the newest of each server.

A step shorter than the time between heartbeats may have none; it then has no figures.
"""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np

from megatron_async_rl.protocol.messages import Heartbeat, Message

_TAGS = {
    "running_requests": "engine/running_requests",
    "queued_requests": "engine/queued_requests",
    "kv_use_fraction": "engine/kv_use_fraction",
    "cache_hit_fraction": "engine/cache_hit_fraction",
    "decode_tokens_per_s": "engine/decode_tokens_per_s",
}


class EngineMonitor:
    def __init__(self) -> None:
        self.newest: dict[str, dict[str, float]] = {}  # worker -> its server's figures
        self._seen: dict[str, tuple[float, float]] = {}  # worker -> time, idle seconds until then
        self._idle_s = self._total_s = 0.0  # since the last step, over all servers
        self._figures: defaultdict[str, dict[str, list[float]]] = defaultdict(dict)

    def received(self, worker: str, message: Message) -> None:
        if not isinstance(message, Heartbeat) or not worker.startswith("rollout-"):
            return
        now = time.monotonic()
        before, idle_before_s = self._seen.get(worker, (now, message.idle_s))
        if idle_before_s <= message.idle_s:  # otherwise the worker was restarted
            self._total_s += now - before
            self._idle_s += min(message.idle_s - idle_before_s, now - before)
        self._seen[worker] = now, message.idle_s
        self.newest[worker] = message.engine
        for name in _TAGS.keys() & message.engine.keys():
            self._figures[name].setdefault(worker, []).append(message.engine[name])

    def step(self) -> dict[str, float]:
        """Returns the figures since the last call: of fractions the mean, else the sum."""
        stats = {}
        if self._total_s:
            stats["perf/engine_idle_fraction"] = self._idle_s / self._total_s
        for name, of_workers in self._figures.items():
            means = [float(np.mean(values)) for values in of_workers.values()]
            stats[_TAGS[name]] = sum(means) / (len(means) if name.endswith("_fraction") else 1)
        self._idle_s = self._total_s = 0.0
        self._figures.clear()
        return stats
