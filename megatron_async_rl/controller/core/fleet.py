"""Connected workers, their load, and the weight version of each rollout server.

A rollout worker:  STALE -> UPDATING -> SERVING -> UPDATING -> ...    any state -> FENCED or gone.
Only SERVING ones get work. A new worker is STALE until it takes a verified weight update.
"""

from __future__ import annotations

import bisect
import enum
from collections import UserDict
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar


class ServerState(enum.Enum):
    STALE = "stale"
    UPDATING = "updating"
    SERVING = "serving"
    FENCED = "fenced"


@dataclass
class Worker:
    """A worker. Its pool sees every change of the attributes by which it is found."""

    _INDEXED: ClassVar[frozenset[str]] = frozenset({"load", "state", "version", "is_held"})

    name: str
    capacity: int
    last_heard: float
    load: int = 0  # running samples, or assigned score requests
    pool: WorkerPool[Any] | None = field(default=None, init=False, repr=False, compare=False)

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if name in self._INDEXED and self.pool is not None:
            self.pool.changed(self)

    @property
    def served_version(self) -> int | None:
        """The version of the weights that work is done with; None if it gets no work."""
        return 0


@dataclass
class RolloutWorker(Worker):
    incarnation: int = 0
    state: ServerState = ServerState.STALE
    version: int = -1
    fenced_because: str = ""
    is_held: bool = False  # stays at its version for an evaluation: no training, no update
    eval_load: int = 0  # running samples of an evaluation, which `load` does not count

    @property
    def is_serving(self) -> bool:
        return self.state is ServerState.SERVING

    @property
    def is_fenced(self) -> bool:
        return self.state is ServerState.FENCED

    @property
    def served_version(self) -> int | None:
        return self.version if self.is_serving and not self.is_held else None


AnyWorker = TypeVar("AnyWorker", bound=Worker)
_Line = tuple[int, int]  # (capacity, served version)


class WorkerPool(UserDict[str, AnyWorker]):
    """Workers by name; finds the least loaded one without a scan.

    Workers of equal capacity and version are in one line, ordered by load and then by name. There
    are few lines: one per version that is served, times the different capacities.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[_Line, list[tuple[int, str]]] = {}
        self._places: dict[str, tuple[_Line, int]] = {}  # line and load of each worker in a line

    def __setitem__(self, name: str, worker: AnyWorker) -> None:
        if name in self:
            del self[name]
        super().__setitem__(name, worker)
        worker.pool = self
        self.changed(worker)

    def __delitem__(self, name: str) -> None:
        self[name].pool = None
        self._leave(name)
        super().__delitem__(name)

    def changed(self, worker: Worker) -> None:
        """Moves the worker to the place of its present version and load."""
        self._leave(worker.name)
        if (version := worker.served_version) is not None:
            line = (worker.capacity, version)
            bisect.insort(self._lines.setdefault(line, []), (worker.load, worker.name))
            self._places[worker.name] = line, worker.load

    def max_room(self, oldest_version: int) -> int:
        """Returns the largest free room of a worker of this version or newer; -1 if none is."""
        rooms = [
            capacity - waiting[0][0]
            for (capacity, version), waiting in self._lines.items()
            if version >= oldest_version
        ]
        return max(rooms, default=-1)

    def least_loaded(self, room: int, oldest_version: int) -> AnyWorker | None:
        """Returns the least loaded worker of this version or newer that has room."""
        free = [
            waiting[0]
            for (capacity, version), waiting in self._lines.items()
            if version >= oldest_version and waiting[0][0] + room <= capacity
        ]
        return self[min(free)[1]] if free else None

    def _leave(self, name: str) -> None:
        if name in self._places:
            line, load = self._places.pop(name)
            waiting = self._lines[line]
            del waiting[bisect.bisect_left(waiting, (load, name))]
            if not waiting:
                del self._lines[line]


@dataclass
class Fleet:
    rollout: WorkerPool[RolloutWorker] = field(default_factory=WorkerPool)
    reward: WorkerPool[Worker] = field(default_factory=WorkerPool)
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

    def max_room(self, oldest_version: int) -> int:
        """Returns how many samples the freest server of this version or newer can take."""
        return self.rollout.max_room(oldest_version)

    def free_server(self, num_samples: int, oldest_version: int) -> RolloutWorker | None:
        """Returns the least loaded worker that serves `oldest_version` or newer and has room."""
        return self.rollout.least_loaded(num_samples, oldest_version)

    def free_reward_worker(self) -> Worker | None:
        return self.reward.least_loaded(1, 0)
