"""Whole runs of the protocol on a virtual clock: connections break, processes are killed, the job
gets SIGTERM, all at messages that are drawn from a seed. The same seed repeats the same run.

Real are the controller with its journal, and of the trainer ranks the links, the agreement of the
leaders and the orders of a weight update. A rank is a thread; one thread runs at a time, and time
passes only when all wait. Training, broadcasts and checkpoints take time and do nothing else.
Servers and a reward worker answer as they should.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import random
import selectors
import signal
import threading
import time
import typing
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from config_builders import config_tree
from protocol_parts import STEPS, Crash, MemoryHub, Rank, Wire, Worker

from megatron_async_rl.cli import audit
from megatron_async_rl.config import load
from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.controller.journal.events import JournalEvent
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, Journal
from megatron_async_rl.data.tokenizer import fingerprint
from megatron_async_rl.errors import Preempted
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.protocol import messages as m
from megatron_async_rl.protocol import sockets
from megatron_async_rl.protocol.hub import Peer
from megatron_async_rl.protocol.wire import Codec
from megatron_async_rl.storage import checkpoints

MAX_STALENESS = 1
LIMIT_S = 7200.0  # of a run, in virtual time
LAST_MESSAGE = 90  # of a rank, at which something may happen
FAULTS = ["connection", "connection", "controller", "trainer", "server"]


class KilledJournal(Journal):
    """A journal that is written only when someone waits for it; a kill loses some of the rest."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.held: list[Any] = []

    def append(self, events: typing.Iterable[JournalEvent]) -> None:
        for event in events:
            self.last_seq += 1
            self.held.append((self.last_seq, event))

    def prune(self, group_ids: list[int]) -> None:
        if group_ids:
            self.held.append(group_ids)

    def flush(self) -> Future[None]:
        self.write(len(self.held))
        waiter = super().flush()
        waiter.result()
        return waiter

    def write(self, count: int) -> None:
        for item in self.held[:count]:
            self._items.put(item)
        self.held = []


class Inline(ThreadPoolExecutor):
    """Runs at once what asyncio.to_thread gets."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as e:
            done.set_exception(e)
        return done


class VirtualSelector(selectors.SelectSelector):
    """Lets the ranks run, and then time pass, instead of waiting."""

    def __init__(self, run: ProtocolRun) -> None:
        super().__init__()
        self.run = run

    def select(self, timeout: float | None = None) -> Any:
        if (timeout is None or timeout > 0) and not self.run.step():
            self.run.pass_time(timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, run: ProtocolRun) -> None:
        super().__init__(VirtualSelector(run))
        self.set_default_executor(Inline())
        self.handlers: dict[int, Callable[[], Any]] = {}

    def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:
        self.handlers[sig] = callback


class ProtocolRun:
    """`replicas` of the trainer, drawn from the seed by default."""

    def __init__(
        self, inputs: tuple[Path, Path], folder: Path, seed: int, replicas: int = 0
    ) -> None:
        r = self.random = random.Random(seed)
        self.folder = folder
        drawn = r.choice([1, 2]), r.choice([1, 1, 2])
        self.replicas, self.stages = (replicas, 1) if replicas else drawn
        self.config = load.from_tree(
            config_tree(
                run={"dir": str(folder), "steps": STEPS},
                model={"path": str(inputs[0]), "context_tokens": 96},
                data={"train": str(inputs[1])},
                rollout={"max_new_tokens": 64, "servers": 2},
                staleness={"max_staleness": MAX_STALENESS},
                algorithm={"prompts_per_step": 2, "samples_per_prompt": 2},
                trainer={"data_parallel_size": self.replicas},
                megatron={"pipeline_model_parallel_size": self.stages},
            )
        )
        last = LAST_MESSAGE * self.replicas
        self.faults = {r.randint(1, last): r.choice(FAULTS) for _ in range(r.randint(0, 3))}
        self.sigterm_at = r.randint(1, last) if r.random() < 0.6 else -1
        self.lost: tuple[str, int] | None = None  # a type of a trainer's messages, and its number
        self.num_messages = 0  # of trainer ranks
        self.terminated = self.must_save = False
        self.tokenizer = fingerprint(inputs[0])
        self.codec = Codec()
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.events: list[tuple[float, int, Callable[[], object]]] = []
        self.wires: dict[Peer, Wire] = {}
        self.hub: MemoryHub | None = None
        self.controller: Controller | None = None
        self.main = threading.Semaphore(0)
        self.ranks: list[Rank] = []
        self.incarnation = 0  # of the trainer
        self.calls: dict[Any, list[dict[int, tuple[str, Any]]]] = {}
        self.shares: dict[tuple[int, int], list[bytes]] = {}
        self.crashed = asyncio.Event()

    def hello(self, name: str, **more: int) -> m.Hello:
        role = typing.cast(m.Role, name.split("-")[0])
        return m.Hello(role, name, 1, capacity=4, tokenizer=self.tokenizer, **more)

    # ---- time

    def at(self, delay_s: float, event: Callable[[], object]) -> None:
        heapq.heappush(self.events, (self.now + delay_s, next(self.numbers), event))

    def step(self) -> bool:
        """Does what is due at this instant; returns whether there was anything."""
        found = False
        while self.events and self.events[0][0] <= self.now:
            heapq.heappop(self.events)[2]()
            found = True
        for wire in list(self.wires.values()):
            found |= wire.deliver()
        for rank in self.ranks:
            if rank.is_due():
                rank.turn.release()
                self.main.acquire()
                found = True
            if rank.error:
                raise rank.error
        return found

    def pass_time(self, timeout: float | None) -> None:
        instants = [self.now + timeout] if timeout is not None else []
        instants += [event[0] for event in self.events[:1]]
        for wire in self.wires.values():
            instants += [wire.to_worker[0][0]] if wire.to_worker else []
            instants += [wire.next_to_hub()] if self.hub and wire.to_hub else []
        instants += [rank.until for rank in self.ranks if not rank.has_ended]
        self.now = max(self.now, min(instants))
        assert self.now < LIMIT_S, "the run does not end"

    # ---- faults

    def is_lost(self, wire: Wire, message: object) -> bool:
        """Returns True once, for the message `lost`."""
        if self.lost is None or not wire.name.startswith("trainer"):
            return False
        kind, number = self.lost
        if type(message).__name__ == kind:
            self.lost = (kind, number - 1) if number > 1 else None
        return self.lost is None

    def saw_message(self, wire: Wire, from_hub: bool = False) -> None:
        """Injects what was drawn for this message, which is under way."""
        if not wire.name.startswith("trainer"):
            return
        self.num_messages += 1
        if self.num_messages == self.sigterm_at:
            self.at(0.0, self.terminate)
        fault = self.faults.pop(self.num_messages, "")
        if fault == "connection":
            wire.break_()
        elif self.terminated:
            return
        elif fault == "controller" and from_hub:
            raise Crash
        elif fault == "controller":
            self.crashed.set()
        elif fault == "trainer":
            self.at(0.0, self.restart_trainer)
        elif fault == "server":
            self.at(0.0, self.random.choice(self.servers).restart)

    def terminate(self) -> None:
        if not (self.controller and signal.SIGTERM in self.loop.handlers):
            self.at(0.1, self.terminate)  # the controller starts
            return
        self.terminated = True
        version = self.controller.core.version
        versions = [rank.version for rank in self.ranks if not rank.is_killed]
        self.must_save = version > 0 and bool(versions) and min(versions) >= version
        self.loop.handlers[signal.SIGTERM]()

    def restart_trainer(self) -> None:
        if self.terminated:
            return
        self.incarnation += 1
        for rank in self.ranks:
            rank.is_killed = True
        self.wires = {p: w for p, w in self.wires.items() if not w.name.startswith("trainer")}
        incarnation = self.incarnation
        self.at(5.0, lambda: self.start_trainer(incarnation))

    def start_trainer(self, incarnation: int) -> None:
        if self.terminated or incarnation != self.incarnation:
            return
        self.ranks = [Rank(self, number) for number in range(self.replicas * self.stages)]
        for rank in self.ranks:
            rank.start()

    # ---- the run

    @property
    def rank(self) -> Rank:
        """The rank that calls."""
        return typing.cast(Rank, threading.current_thread())

    def connect(self, *_: object) -> Wire:
        return Wire(self, f"trainer-{self.rank.number}")

    def run(self) -> None:
        """Raises AssertionError, or an error of a process, if a guarantee does not hold."""
        (self.folder / sockets.ADDRESS_FILE).write_text("tcp://127.0.0.1:1\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: self.now)
            patch.setattr(sockets, "connect", self.connect)
            before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # of a controller that stalls
            self.loop = VirtualLoop(self)
            try:
                self.loop.run_until_complete(self.body())
            finally:
                self.end()
                signal.signal(signal.SIGUSR2, before)
        self.check()

    def end(self) -> None:
        """Ends threads and tasks that a failed run has left."""
        for rank in self.ranks:
            rank.is_killed = True
            while not rank.has_ended:
                rank.turn.release()
                self.main.acquire()
        self.ranks = []
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(1.0))
        self.loop.close()

    async def body(self) -> None:
        self.servers = [Worker(self, f"rollout-{number}") for number in range(2)]
        Worker(self, "reward-0")
        self.start_trainer(0)
        was_killed = await self.run_controller()
        while was_killed:
            await asyncio.sleep(self.random.uniform(0.5, 15.0))
            was_killed = await self.run_controller()
        await asyncio.sleep(60.0)  # its last orders are under way
        left = [rank for rank in self.ranks if not rank.has_ended]
        if self.was_preempted:  # the launcher ends the ranks that have not joined
            left = [rank for rank in left if rank.version >= 0]
        assert not left, "a rank does not end"

    async def run_controller(self) -> bool:
        """Returns True if the controller was killed."""
        with contextlib.ExitStack() as opened:
            journal = KilledJournal(self.folder / JOURNAL_FILE)
            opened.callback(journal.close)
            log = opened.enter_context(contextlib.closing(RunLog(self.folder, self.config)))
            self.hub, self.crashed = MemoryHub(self), asyncio.Event()
            controller = Controller(self.config, typing.cast(Any, self.hub), log, journal)
            self.controller = controller
            running = asyncio.create_task(controller.run())
            crashed = asyncio.create_task(self.crashed.wait())
            await asyncio.wait({running, crashed}, return_when=asyncio.FIRST_COMPLETED)
            was_killed = not running.done()
            for task in (running, crashed):
                task.cancel()
            [error, _] = await asyncio.gather(running, crashed, return_exceptions=True)
            was_killed = was_killed or isinstance(error, Crash)
            self.hub = self.controller = None
            self.loop.handlers.clear()
            journal.write(self.random.randint(0, len(journal.held)) if was_killed else 1 << 30)
            if was_killed:
                for wire in self.wires.values():
                    wire.break_()
            elif isinstance(error, BaseException) and not isinstance(error, Preempted):
                raise error
            self.version, self.was_preempted = controller.core.version, error is not None
        return was_killed

    def check(self) -> None:
        result = audit.audit(self.folder, MAX_STALENESS)
        assert (result.breaches, result.lost, result.duplicated) == ([], 0, 0)
        saved = checkpoints.list_manifests(self.folder)
        if self.was_preempted:
            assert not self.must_save or saved[0].version == self.version, "not saved at SIGTERM"
        else:
            assert self.version == saved[0].version == STEPS
            assert result.pending == 0
