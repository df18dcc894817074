"""Who lives, who is free, and which weights each rollout server holds.

A rollout worker:  STALE -> UPDATING -> SERVING -> UPDATING -> ...   and from anywhere -> FENCED or gone.
Only SERVING ones get work. A worker enters as STALE: it must take a verified weight update first.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field


class ServerState(enum.Enum):
    STALE = "stale"
    UPDATING = "updating"
    SERVING = "serving"
    FENCED = "fenced"


@dataclass
class Worker:
    name: str
    capacity: int
    last_heard: float
    load: int = 0  # samples in flight, or verdicts under way


@dataclass
class RolloutWorker(Worker):
    state: ServerState = ServerState.STALE
    version: int = -1
    reason: str = ""  # why it is fenced

    @property
    def is_serving(self) -> bool:
        return self.state is ServerState.SERVING


@dataclass
class Fleet:
    rollout: dict[str, RolloutWorker] = field(default_factory=dict)
    reward: dict[str, Worker] = field(default_factory=dict)

    def heard(self, name: str, now: float) -> None:
        for worker in (self.rollout.get(name), self.reward.get(name)):
            if worker:
                worker.last_heard = now

    def silent_since(self, limit: float) -> list[str]:
        """Names of the workers last heard of before `limit`."""
        return [worker.name for worker in self._all() if worker.last_heard < limit]

    def free_server(self, num_samples: int, oldest_version: int) -> RolloutWorker | None:
        """The least loaded worker that serves `oldest_version` or a newer one and has room for so many samples."""
        serving = (
            w
            for w in self.rollout.values()
            if w.state is ServerState.SERVING and w.version >= oldest_version
        )
        free = [w for w in serving if w.load + num_samples <= w.capacity]
        return min(free, key=lambda w: (w.load, w.name), default=None)

    def free_judge(self) -> Worker | None:
        free = [w for w in self.reward.values() if w.load < w.capacity]
        return min(free, key=lambda w: (w.load, w.name), default=None)

    def _all(self) -> Iterator[Worker]:
        yield from self.rollout.values()
        yield from self.reward.values()
