"""Connected workers, their load, and the weight version of each rollout server.

A rollout worker:  STALE -> UPDATING -> SERVING -> UPDATING -> ...    any state -> FENCED or gone.
Only SERVING ones get work. A new worker is STALE until it takes a verified weight update.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar


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
    load: int = 0  # running samples, or assigned score requests


@dataclass
class RolloutWorker(Worker):
    incarnation: int = 0
    state: ServerState = ServerState.STALE
    version: int = -1
    fenced_because: str = ""

    @property
    def is_serving(self) -> bool:
        return self.state is ServerState.SERVING

    @property
    def is_fenced(self) -> bool:
        return self.state is ServerState.FENCED


AnyWorker = TypeVar("AnyWorker", bound=Worker)


@dataclass
class Fleet:
    rollout: dict[str, RolloutWorker] = field(default_factory=dict)
    reward: dict[str, Worker] = field(default_factory=dict)
    num_joined: int = 0

    def join_rollout(self, name: str, capacity: int, now: float) -> RolloutWorker:
        self.num_joined += 1
        self.rollout[name] = RolloutWorker(name, capacity, now, incarnation=self.num_joined)
        return self.rollout[name]

    def heard(self, name: str, now: float) -> None:
        """Notes that the worker is alive."""
        if worker := self.rollout.get(name) or self.reward.get(name):
            worker.last_heard = now

    def silent_since(self, limit: float) -> list[str]:
        """Returns the names of the workers last heard before `limit`."""
        workers = [*self.rollout.values(), *self.reward.values()]
        return [worker.name for worker in workers if worker.last_heard < limit]

    def free_server(self, num_samples: int, oldest_version: int) -> RolloutWorker | None:
        """Returns the least loaded worker that serves `oldest_version` or newer and has room."""
        serving = (w for w in self.rollout.values() if w.is_serving and w.version >= oldest_version)
        return _least_loaded(serving, num_samples)

    def free_reward_worker(self) -> Worker | None:
        return _least_loaded(self.reward.values(), 1)


def _least_loaded(workers: Iterable[AnyWorker], room: int) -> AnyWorker | None:
    free = [w for w in workers if w.load + room <= w.capacity]
    return min(free, key=lambda w: (w.load, w.name), default=None)
