"""Keeps the processes that a launcher started alive: who dies is started again alone, within limits, others go on.

    rollout or reward worker   anew; given up after faults.max_restarts; the run ends below faults.min_servers
    trainer                    anew, all ranks: it goes on from its checkpoint and the recorded batches
    trainer-0, trainer-1 ...   their lives are their own affair (node/): anew when one was killed, on all hosts
    controller                 anew when it was killed; an error that it, or trainer-N, names itself ends the run
    silent worker              killed first: the controller tells of it in status.json
    controller without news    the same, when status.json has not changed for faults.heartbeat_timeout_s
    taken over                 left alone: another launcher, on another host, has started it since (claims.py)

Before the first training step nothing is started anew: whoever dies then, dies of its settings.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.config.sections import FaultsConfig
from megatron_async_rl.errors import DataError
from megatron_async_rl.launcher.claims import Claims
from megatron_async_rl.observability.run_log import FINAL_STATES, STATUS_FILE, Status, read_status

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
    given_up: bool = False  # died too often, or another launcher's now
    last_code: int | None = None
    joining: bool = False  # started while the run is on, and not heard of yet: its start has a deadline of its own

    @property
    def role(self) -> str:
        return self.name.split("-")[0]

    @property
    def names_its_errors(self) -> bool:
        """Exit code 2 is the run's end: it has seen to it itself that nothing else helps."""
        return self.role == "controller" or (self.role == "trainer" and self.name != "trainer")

    @property
    def ended_well(self) -> bool:
        return self.process.poll() == 0


class Supervisor:
    """`over` is asked again and again; `failed` then names whose end ended the run, `why` the rule behind it.

    A launcher that joined a run (`join`) has neither controller nor, perhaps, trainer: status.json tells it of the end.
    """

    def __init__(self, run_dir: Path, rules: FaultsConfig, tell: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.rules = rules
        self.tell = tell
        self.claims = Claims(run_dir)
        self.children: dict[str, Child] = {}
        self.failed = ""
        self.why = ""
        self.num_restarts = 0
        self._began = False  # the run has been seen training
        self._silent: dict[str, float] = {}  # worker -> since when it is reported lost
        self._news: tuple[int, float] = (
            0,
            time.monotonic(),
        )  # status.json's time of change, and when we saw it

    def start(self, name: str, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.claims.take(name)
        joining = (
            name != "controller" and "controller" not in self.children
        )  # the run is on: the name may be reported lost
        self.children[name] = Child(name, start, start(), time.monotonic(), joining=joining)

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        return [child.process for child in self.children.values()]

    @property
    def trainers(self) -> list[Child]:
        return [child for child in self.children.values() if child.role == "trainer"]

    @property
    def silent_s(self) -> float:
        """Since the controller last wrote status.json."""
        return time.monotonic() - self._news[1]

    def over(self) -> bool:
        """Whether there is nothing more to wait for; starts again who died, unless that ends the run."""
        status = self._status()
        ending = self._is_ending(status)
        if ending and all(trainer.ended_well or trainer.given_up for trainer in self.trainers):
            return True
        self._began = self._began or status.state == "training"
        if not ending:  # once the controller has ended well, whoever ends does so in order
            self._kill_the_silent(status)
        now = time.monotonic()
        for child in self.children.values():
            if child.start_again_at is not None:
                if now >= child.start_again_at:
                    self._start_again(child, now)
            elif not child.given_up and (code := child.process.poll()) is not None:
                self._ended(child, code, now, ending)
        return bool(self.failed) or all(child.given_up for child in self.children.values())

    def _is_ending(self, status: Status) -> bool:
        """The controller has ended well; or, where another launcher has it, says that the run is over."""
        controller = self.children.get("controller")
        return controller.ended_well if controller else status.state in FINAL_STATES

    def _ended(self, child: Child, code: int, now: float, ending: bool) -> None:
        if code == 0 and (ending or child.role in ("controller", "trainer")):
            return
        child.last_code = code
        if owner := self.claims.other(child.name):
            child.given_up = True
            self.tell(
                f"{child.name} ended with exit code {code} and is not started again here: {owner} has it"
            )
            return
        if not self._began or (child.names_its_errors and code == processes.EXIT_ERROR):
            self.failed = self.failed or child.name
            return
        if now - child.started > self.rules.restart_reset_s:
            child.restarts = 0
        processes.stop([child.process], 0.0)  # whatever of its group is left
        if child.restarts >= self.rules.max_restarts:
            self._give_up(child)
            return
        pause_s = min(self.rules.restart_backoff_s * 2**child.restarts, MAX_BACKOFF_S)
        child.start_again_at = now + pause_s
        self.tell(
            f"{child.name} ended with exit code {code}; it is started again in {pause_s:.0f} s"
        )

    def _start_again(self, child: Child, now: float) -> None:
        child.start_again_at = None
        if owner := self.claims.other(child.name):
            child.given_up = True
            self.tell(f"{child.name} is not started again here: {owner} has it")
            return
        child.restarts += 1
        self.num_restarts += 1
        child.process, child.started = child.start(), now
        child.joining = True
        self._silent.pop(child.name, None)

    def _give_up(self, child: Child) -> None:
        child.given_up = True
        times = f"{child.name} died {child.restarts + 1} times (faults.max_restarts = {self.rules.max_restarts})"
        left = sum(c.role == child.role and not c.given_up for c in self.children.values())
        left += self.claims.elsewhere(child.role)
        least = {"rollout": self.rules.min_servers}.get(child.role, 1)
        if left >= least and child.role != "trainer":  # all its hosts are needed
            self.tell(f"{times} and is given up; {left} {child.role} workers go on")
            return
        self.failed = self.failed or child.name
        self.why = times
        if child.role == "rollout":
            self.why += (
                f", which leaves {left} servers (faults.min_servers = {self.rules.min_servers})"
            )

    def _kill_the_silent(self, status: Status) -> None:
        """A process that lives and does nothing is ended here, so that it is started again like a dead one."""
        now = time.monotonic()
        for child in self.children.values():
            starting = (
                now - child.started < 2 * self.rules.heartbeat_timeout_s
            )  # an earlier life may not be reported lost yet
            child.joining = child.joining and (starting or child.name in status.lost)
        lost = [
            name
            for name in status.lost
            if name in self.children and not self.children[name].joining
        ]
        self._silent = {name: self._silent.get(name, now) for name in lost}
        for name, since in self._silent.items():
            child = self.children[name]
            if (
                now - max(since, child.started) > self.rules.heartbeat_timeout_s
                and child.process.poll() is None
            ):
                self.tell(f"{name} is silent; it is killed")
                processes.stop([child.process], 0.0)
        controller = self.children.get("controller")
        if controller is None or controller.process.poll() is not None or not self._began:
            return
        if now - max(self._news[1], controller.started) > self.rules.heartbeat_timeout_s:
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
