"""Keeps the processes of a run alive: who dies is started again alone, within limits, while the others go on.

    rollout or reward worker   anew; given up after faults.max_restarts; the run ends below faults.min_servers
    trainer                    anew, all ranks: it goes on from its checkpoint and the recorded batches
    controller                 anew when it was killed; an error that it names itself ends the run
    silent worker              killed first: the controller tells of it in status.json
    controller without news    the same, when status.json has not changed for faults.silence_s

Before the first training step nothing is started anew: whoever dies then, dies of its settings.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.config import FaultsConfig
from megatron_async_rl.errors import DataError
from megatron_async_rl.metrics import STATUS_FILE, Status, read_status

logger = logging.getLogger(__name__)
MAX_BACKOFF_S = 60.0


@dataclass
class Child:
    """One process of the run and its lives."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes]
    started: float
    restarts: int = 0  # since it last was healthy
    start_again_at: float | None = None
    given_up: bool = False
    last_code: int | None = None
    joining: bool = False  # started again, and still reported lost: its start has a deadline of its own

    @property
    def role(self) -> str:
        return self.name.split("-")[0]


@dataclass
class Supervisor:
    """`over` is asked again and again; `failed` then names whose end ended the run, `why` the rule behind it."""

    run_dir: Path
    rules: FaultsConfig
    tell: Callable[[str], None]
    children: dict[str, Child] = field(default_factory=dict)
    failed: str = ""
    why: str = ""
    num_restarts: int = 0
    _began: bool = False  # the run has been seen training
    _silent: dict[str, float] = field(default_factory=dict)  # worker -> since when it is reported lost
    _news: tuple[int, float] = (0, 0.0)  # status.json's time of change, and when we saw it

    def start(self, name: str, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.children[name] = Child(name, start, start(), time.monotonic())

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        return [child.process for child in self.children.values()]

    def over(self) -> bool:
        """Whether there is nothing more to wait for; starts again who died, unless that ends the run."""
        controller, trainer = self.children["controller"], self.children["trainer"]
        if controller.process.poll() == 0 and trainer.process.poll() == 0:
            return True
        status = self._status()
        self._began = self._began or status.state == "training"
        if controller.process.poll() != 0:  # once it has ended well, whoever ends does so in order
            self._kill_the_silent(status)
        now = time.monotonic()
        for child in self.children.values():
            if child.start_again_at is not None:
                if now >= child.start_again_at:
                    self._start_again(child, now)
            elif not child.given_up and (code := child.process.poll()) is not None:
                self._ended(child, code, now, controller)
        return bool(self.failed)

    def _ended(self, child: Child, code: int, now: float, controller: Child) -> None:
        if code == 0 and (child in (controller, self.children["trainer"]) or controller.process.poll() == 0):
            return
        child.last_code = code
        if not self._began or (child is controller and code == processes.EXIT_ERROR):
            self.failed = self.failed or child.name
            return
        if now - child.started > self.rules.healthy_s:
            child.restarts = 0
        processes.stop([child.process], 0.0)  # whatever of its group is left
        if child.restarts >= self.rules.max_restarts:
            self._give_up(child)
            return
        pause_s = min(self.rules.backoff_s * 2**child.restarts, MAX_BACKOFF_S)
        child.start_again_at = now + pause_s
        self.tell(f"{child.name} ended with exit code {code}; it is started again in {pause_s:.0f} s")

    def _start_again(self, child: Child, now: float) -> None:
        child.restarts += 1
        self.num_restarts += 1
        child.process, child.started, child.start_again_at = child.start(), now, None
        child.joining = True
        self._silent.pop(child.name, None)

    def _give_up(self, child: Child) -> None:
        child.given_up = True
        times = f"{child.name} died {child.restarts + 1} times (faults.max_restarts = {self.rules.max_restarts})"
        left = [c for c in self.children.values() if c.role == child.role and not c.given_up]
        least = {"rollout": self.rules.min_servers}.get(child.role, 1)
        if len(left) >= least:
            self.tell(f"{times} and is given up; {len(left)} {child.role} workers go on")
            return
        self.failed = self.failed or child.name
        self.why = times
        if child.role == "rollout":
            self.why += f", which leaves {len(left)} servers (faults.min_servers = {self.rules.min_servers})"

    def _kill_the_silent(self, status: Status) -> None:
        """A process that lives and does nothing is ended here, so that it is started again like a dead one."""
        now = time.monotonic()
        for child in self.children.values():
            child.joining = child.joining and child.name in status.lost
        lost = [name for name in status.lost if name in self.children and not self.children[name].joining]
        self._silent = {name: self._silent.get(name, now) for name in lost}
        for name, since in self._silent.items():
            child = self.children[name]
            if now - max(since, child.started) > self.rules.silence_s and child.process.poll() is None:
                self.tell(f"{name} is silent; it is killed")
                processes.stop([child.process], 0.0)
        controller = self.children["controller"]
        no_news = self._began and now - max(self._news[1], controller.started) > self.rules.silence_s
        if no_news and controller.process.poll() is None:
            self.tell("the controller gives no sign of life; it is killed")
            processes.stop([controller.process], 0.0)

    def _status(self) -> Status:
        path = self.run_dir / STATUS_FILE
        try:
            changed = path.stat().st_mtime_ns
            if changed != self._news[0]:  # by this host's monotonic clock: wall clocks jump
                self._news = (changed, time.monotonic())
            return read_status(self.run_dir)
        except (DataError, OSError):
            return Status()
