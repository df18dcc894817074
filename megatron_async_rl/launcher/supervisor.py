"""Restarts the processes of one launcher: each one that dies is restarted alone, within limits.

    rollout or reward worker   restarted; given up after faults.max_restarts failures; the run ends
                               below faults.min_servers servers
    trainer                    restarted with all ranks; resumes from checkpoint and stored batches
    trainer-0, trainer-1 ...   nodes restart their ranks (node/); a node that is killed is restarted
    controller                 restarted if it crashed, and trainers that it told to end with it;
                               exit code 2 of it or of a node ends the run, and 75 the launcher
    worker without heartbeat   killed, then restarted; the controller lists it in status.json
    controller that hangs      the same, if status.json is unchanged for faults.heartbeat_timeout_s
    name claimed by another    left alone: another launcher has started it since (claims.py)

No process is restarted before the first training step: an early exit is taken for a wrong setting.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.config.sections import FaultsConfig
from megatron_async_rl.errors import DataError
from megatron_async_rl.launcher.claims import Claims
from megatron_async_rl.observability.status import (
    FINAL_STATES,
    STATUS_FILE,
    RunStatus,
    read_status,
)


@dataclass
class Child:
    """One process of the run, over its restarts."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes]
    started: float
    restarts: int = 0  # since it last was healthy
    restart_at: float | None = None
    given_up: bool = False  # failed too often, or claimed by another launcher
    last_code: int | None = None
    connecting: bool = False  # started during the run: status.json may still list it as lost

    @property
    def role(self) -> str:
        return self.name.split("-")[0]

    @property
    def error_is_final(self) -> bool:
        """True if exit code 2 ends the run: controller and nodes use it only if it must end."""
        return self.role == "controller" or (self.role == "trainer" and self.name != "trainer")

    @property
    def succeeded(self) -> bool:
        return self.process.poll() == 0


class Supervisor:
    """Call `poll` repeatedly until it is true; `failed` then names the process that ended the run.

    A launcher of `join` has no controller and perhaps no trainer: it learns of the end of the run
    from status.json.
    """

    def __init__(self, run_dir: Path, faults: FaultsConfig, log: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.faults = faults
        self.log = log
        self.claims = Claims(run_dir)
        self.children: dict[str, Child] = {}
        self.failed = ""
        self.reason = ""  # the limit that was exceeded, if the run failed by one
        self.num_restarts = 0
        self._has_trained = False  # the run was seen in the state `training`
        self._lost_since: dict[str, float] = {}  # by worker, as status.json lists them
        self._status_mtime_ns = 0
        self._status_changed = time.monotonic()

    def start(self, name: str, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.claims.take(name)
        connecting = name != "controller" and "controller" not in self.children
        self.children[name] = Child(name, start, start(), time.monotonic(), connecting=connecting)

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        return [child.process for child in self.children.values()]

    @property
    def trainers(self) -> list[Child]:
        return [child for child in self.children.values() if child.role == "trainer"]

    @property
    def status_age_s(self) -> float:
        """Seconds since the controller last wrote status.json."""
        return time.monotonic() - self._status_changed

    def poll(self) -> bool:
        """Restarts processes that died. Returns True if the run has ended."""
        status = self._read_status()
        ending = self._is_ending(status)
        if ending and all(trainer.succeeded or trainer.given_up for trainer in self.trainers):
            return True
        self._has_trained = self._has_trained or status.state == "training"
        if not ending:  # later, workers end by themselves and send no heartbeat
            self._kill_lost_workers(status)
            self._kill_hanging_controller()
        now = time.monotonic()
        for child in self.children.values():
            if child.restart_at is not None:
                if now >= child.restart_at:
                    self._restart(child, now)
                    if child.role == "controller" and status.version < status.steps:
                        self._restart_ended_trainers(now)
            elif not child.given_up and (code := child.process.poll()) is not None:
                self._handle_exit(child, code, now, ending or status.state in FINAL_STATES)
        return bool(self.failed) or all(child.given_up for child in self.children.values())

    def _is_ending(self, status: RunStatus) -> bool:
        controller = self.children.get("controller")
        return controller.succeeded if controller else status.state in FINAL_STATES

    def _handle_exit(self, child: Child, code: int, now: float, ending: bool) -> None:
        if code == 0 and (ending or child.role in ("controller", "trainer")):
            return
        child.last_code = code
        if self._is_claimed_by_other(child, f" after exit code {code}"):
            return
        if not self._has_trained or (child.error_is_final and code == processes.EXIT_ERROR):
            self.failed = self.failed or child.name
            return
        if now - child.started > self.faults.restart_reset_s:
            child.restarts = 0
        processes.stop([child.process], 0.0)  # kills the rest of its process group
        self._plan_restart(child, now, f"ended with exit code {code}")

    def _plan_restart(self, child: Child, now: float, reason: str) -> None:
        if child.restarts >= self.faults.max_restarts:
            self._give_up(child)
            return
        pause_s = self.faults.restart_pause_s(child.restarts + 1)
        child.restart_at = now + pause_s
        self.log(f"{child.name} {reason}; restart in {pause_s:.0f} s")

    def _restart(self, child: Child, now: float) -> None:
        child.restart_at = None
        if self._is_claimed_by_other(child):
            return
        child.restarts += 1
        self.num_restarts += 1
        try:
            child.process, child.started = child.start(), now
        except OSError as e:  # no memory or process left, or its log cannot be opened
            self._plan_restart(child, now, f"cannot be started: {e}")
            return
        child.connecting = True
        self._lost_since.pop(child.name, None)

    def _restart_ended_trainers(self, now: float) -> None:
        """Restarts trainers that an earlier controller told to end before it was killed."""
        for trainer in self.trainers:
            if trainer.succeeded and trainer.restart_at is None:
                trainer.restart_at = now

    def _is_claimed_by_other(self, child: Child, when: str = "") -> bool:
        owner = ""
        with contextlib.suppress(OSError):  # of a network file system, which may pass
            owner = self.claims.other_owner(child.name)
        if owner:
            child.given_up = True
            self.log(f"{child.name} is not restarted here{when}: {owner} has taken it over")
        return bool(owner)

    def _give_up(self, child: Child) -> None:
        child.given_up = True
        limit = f"(faults.max_restarts = {self.faults.max_restarts})"
        times = f"{child.name} died {child.restarts + 1} times {limit}"
        left = sum(c.role == child.role and not c.given_up for c in self.children.values())
        left += self.claims.count_elsewhere(child.role)
        needed = self.faults.min_servers if child.role == "rollout" else 1
        if left >= needed and child.role != "trainer":  # all nodes of a trainer are needed
            self.log(f"{times} and is given up; {left} {child.role} workers remain")
            return
        self.failed = self.failed or child.name
        self.reason = times
        if child.role == "rollout":
            limit = f"(faults.min_servers = {self.faults.min_servers})"
            self.reason += f", which leaves {left} servers {limit}"

    def _kill_lost_workers(self, status: RunStatus) -> None:
        """Kills processes that run but send no heartbeat, so that they are restarted."""
        now, limit_s = time.monotonic(), self.faults.heartbeat_timeout_s
        for child in self.children.values():
            # until this time an earlier incarnation may not be listed as lost yet
            starting = now - child.started < 2 * limit_s
            child.connecting = child.connecting and (starting or child.name in status.lost)
        lost = [c for name in status.lost if (c := self.children.get(name)) and not c.connecting]
        self._lost_since = {c.name: self._lost_since.get(c.name, now) for c in lost}
        for child in lost:
            since = max(self._lost_since[child.name], child.started)
            if now - since > limit_s and child.process.poll() is None:
                self.log(f"{child.name} sends no heartbeat; it is killed")
                processes.stop([child.process], 0.0)

    def _kill_hanging_controller(self) -> None:
        controller = self.children.get("controller")
        if controller is None or controller.process.poll() is not None or not self._has_trained:
            return
        since = max(self._status_changed, controller.started)
        if time.monotonic() - since > self.faults.heartbeat_timeout_s:
            self.log("the controller does not update status.json; it is killed")
            processes.stop([controller.process], 0.0)

    def _read_status(self) -> RunStatus:
        try:
            mtime_ns = (self.run_dir / STATUS_FILE).stat().st_mtime_ns
            if mtime_ns != self._status_mtime_ns:  # age by our monotonic clock: wall clocks jump
                self._status_mtime_ns, self._status_changed = mtime_ns, time.monotonic()
            return read_status(self.run_dir)
        except (DataError, OSError):
            return RunStatus()
