"""Connected workers, their load, and the weight version of each rollout server.

A rollout worker:  STALE -> UPDATING -> SERVING -> UPDATING -> ...    any state -> FENCED or gone.
Only SERVING ones get work. A new worker is STALE until it takes a verified weight update.
"""

from __future__ import annotations

import bisect
import enum
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

MIXED_SHARE = 4  # 1 / MIXED_SHARE of a server's capacity is for evaluation in its mode `mixed`


class ServerState(enum.Enum):
    STALE = "stale"
    UPDATING = "updating"
    SERVING = "serving"
    FENCED = "fenced"


@dataclass
class Worker:
    """A worker. Its pool sees every change of the attributes by which it is found."""

    _INDEXED: ClassVar[frozenset[str]] = frozenset(
        {"load", "eval_load", "state", "version", "is_held", "is_full", "is_full_for_evaluation"}
    )

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
    def line(self) -> Line | None:
        """The line in which it waits for work; None if it gets none."""
        return Line(self.capacity, 0)

    @property
    def eval_line(self) -> EvalLine | None:
        """The line in which it waits for samples of an evaluation."""
        return None

    @property
    def total_load(self) -> int:
        return self.load


@dataclass
class RolloutWorker(Worker):
    incarnation: int = 0
    state: ServerState = ServerState.STALE
    version: int = -1
    fenced_because: str = ""
    is_held: bool = False  # stays at its version for an evaluation: no training, no update
    eval_load: int = 0  # running samples of an evaluation, which `load` does not count
    # its KV cache (kv_cache.py)
    kv_tokens: float | None = None  # that samples may hold; None: not known
    prompt_tokens: int = 0  # of the groups that run
    eval_prompt_tokens: int = 0
    has_pressure: bool = False
    is_full: bool = False
    is_full_for_evaluation: bool = False

    @property
    def is_serving(self) -> bool:
        return self.state is ServerState.SERVING

    @property
    def is_fenced(self) -> bool:
        return self.state is ServerState.FENCED

    @property
    def line(self) -> Line | None:
        serves = self.is_serving and not self.is_held and not self.is_full
        return Line(self.capacity, self.version) if serves else None

    @property
    def eval_line(self) -> EvalLine | None:
        has_share = self.eval_load < max(1, self.capacity // MIXED_SHARE)
        line = EvalLine(self.capacity, self.version, self.is_held, has_share)
        return line if self.is_serving and not self.is_full_for_evaluation else None

    @property
    def total_load(self) -> int:
        return self.load + self.eval_load


class Line(NamedTuple):
    capacity: int
    version: int  # of the weights that are served


class EvalLine(NamedTuple):
    capacity: int
    version: int
    is_held: bool
    has_share: bool  # of mode `mixed`


AnyWorker = TypeVar("AnyWorker", bound=Worker)
AnyLine = TypeVar("AnyLine", Line, EvalLine)


class Lines(Generic[AnyLine]):
    """Names in lines of equal workers, ordered by load and then by name.

    There are few lines: one per version that is served, times the different capacities.
    """

    def __init__(self) -> None:
        self._lines: dict[AnyLine, list[tuple[int, str]]] = {}
        self._places: dict[str, tuple[AnyLine, int]] = {}  # line and load of each name

    def move(self, name: str, line: AnyLine | None, load: int) -> None:
        """Moves a name into a line, or out of all."""
        if name in self._places:
            left, earlier_load = self._places.pop(name)
            waiting = self._lines[left]
            del waiting[bisect.bisect_left(waiting, (earlier_load, name))]
            if not waiting:
                del self._lines[left]
        if line is not None:
            bisect.insort(self._lines.setdefault(line, []), (load, name))
            self._places[name] = line, load

    def first(self, room: int, fits: Callable[[AnyLine], bool]) -> str | None:
        """Returns the least loaded name that has room, of the lines that fit."""
        free = [
            waiting[0]
            for line, waiting in self._lines.items()
            if waiting[0][0] + room <= line.capacity and fits(line)
        ]
        return min(free)[1] if free else None

    def max_room(self, fits: Callable[[AnyLine], bool]) -> int:
        """Returns the largest free room of the lines that fit; -1 if none does."""
        rooms = [line.capacity - w[0][0] for line, w in self._lines.items() if fits(line)]
        return max(rooms, default=-1)


class WorkerPool(UserDict[str, AnyWorker]):
    """Workers by name; finds the least loaded one without a scan."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: Lines[Line] = Lines()
        self._eval_lines: Lines[EvalLine] = Lines()

    def __setitem__(self, name: str, worker: AnyWorker) -> None:
        if name in self:
            del self[name]
        super().__setitem__(name, worker)
        worker.pool = self
        self.changed(worker)

    def __delitem__(self, name: str) -> None:
        self[name].pool = None
        self._lines.move(name, None, 0)
        self._eval_lines.move(name, None, 0)
        super().__delitem__(name)

    def changed(self, worker: Worker) -> None:
        """Moves the worker to the place of its present version and load."""
        self._lines.move(worker.name, worker.line, worker.load)
        self._eval_lines.move(worker.name, worker.eval_line, worker.total_load)

    def max_room(self, oldest_version: int) -> int:
        """Returns the largest free room of a worker of this version or newer; -1 if none is."""
        return self._lines.max_room(lambda line: line.version >= oldest_version)

    def least_loaded(self, room: int, oldest_version: int) -> AnyWorker | None:
        """Returns the least loaded worker of this version or newer that has room."""
        name = self._lines.first(room, lambda line: line.version >= oldest_version)
        return None if name is None else self[name]

    def free_for_evaluation(self, fits: Callable[[EvalLine], bool]) -> AnyWorker | None:
        """Returns the worker with the least total load that has room for one more sample."""
        name = self._eval_lines.first(1, fits)
        return None if name is None else self[name]


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
