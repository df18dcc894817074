"""The processes of one launcher, its signals, and how they end; used by `run` and `join`."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from megatron_async_rl import processes
from megatron_async_rl.config.config import Config
from megatron_async_rl.launcher import roles
from megatron_async_rl.launcher.supervisor import Supervisor

STOP_GRACE_S = 15.0  # from SIGTERM to SIGKILL
WORKER_EXIT_S = 20.0  # for workers to end by themselves once controller and trainer have
PREEMPTED_EXIT_S = 5.0  # for others to end once a preempted controller has: nothing more is saved
LOG_TAIL_LINES = 15
TORCHRUN_REPORT = "torch/distributed/elastic/multiprocessing/api.py:"  # after the lines of a rank


@dataclass
class Session:
    """The processes of one launcher, and whether a signal asked it to stop.

    The first SIGTERM preempts the run: it saves its state within `grace_s`. A second one, or
    SIGINT, stops it at once, unless `ignore_more_sigterms`.
    """

    run_dir: Path
    supervisor: Supervisor
    grace_s: float
    ignore_more_sigterms: bool = False
    interrupted: int = 0  # the signal that stops the run at once
    preempted_at: float | None = None
    controller_ended_at: float | None = None  # after preemption
    log_begins: dict[str, int] = field(default_factory=dict)  # bytes before the newest start

    @property
    def preempted(self) -> bool:
        return self.preempted_at is not None

    def start(self, config: Config, names: Collection[str], temporary: Path) -> None:
        """Starts processes, with their temporary files in `temporary`."""
        variables = processes.temporary_environment(temporary)
        for name, command in roles.commands(config, self.run_dir, names).items():
            self.supervisor.start(name, partial(self._start, name, command, variables))

    def _start(
        self, name: str, command: roles.Command, variables: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        log = self.log_path(name)
        begin = processes.log_size(log)
        process = processes.start(
            command.arguments,
            log,
            command.env | variables,
            sigterm_blocked=command.sigterm_blocked,
        )
        self.log_begins[name] = begin
        return process

    def log_path(self, name: str) -> Path:
        return self.run_dir / "logs" / f"{name}.log"

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_signal(self, number: int, _: object) -> None:
        if number == signal.SIGTERM and not self.preempted:
            self.preempted_at = time.monotonic()
            self._forward_sigterm()
        elif number != signal.SIGTERM or not self.ignore_more_sigterms:
            self.interrupted = number

    def _forward_sigterm(self) -> None:
        """Sends SIGTERM to the controller, which notifies the others, else to the workers.

        A trainer here saves when its controller, on another host, is preempted too. Workers without
        one need no signal: `poll` ends and they are stopped.
        """
        children = self.supervisor.children
        if "controller" in children:
            receivers = [children["controller"]]
        elif self.supervisor.trainers:
            receivers = [child for child in children.values() if child.role != "trainer"]
        else:
            receivers = []
        for child in receivers:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
                child.process.send_signal(signal.SIGCONT)  # a suspended one gets the first then

    def poll(self) -> bool:
        """Supervises the processes. Returns True if the session is over."""
        if self.interrupted:
            return True
        now = time.monotonic()
        controller = self.supervisor.children.get("controller")
        if controller and controller.process.poll() == processes.EXIT_REQUEUE:
            # a SIGTERM may have reached it alone: it has told all processes to end
            self.preempted_at = self.preempted_at or now
        if self.preempted_at is None:
            return self.supervisor.poll()
        awaited = self.supervisor.processes
        if controller is None:
            awaited = [trainer.process for trainer in self.supervisor.trainers]
        if all(process.poll() is not None for process in awaited):
            return True
        if controller and controller.process.poll() is not None:
            self.controller_ended_at = self.controller_ended_at or now
            if now - self.controller_ended_at > PREEMPTED_EXIT_S:
                return True
        return now - self.preempted_at > self.grace_s

    def stop(self, console: Console) -> None:
        """Stops the processes that still run; names them first after a signal to stop at once."""
        grace_s = 0.0 if self.preempted else STOP_GRACE_S
        if self.interrupted:
            name = signal.Signals(self.interrupted).name
            children = self.supervisor.children.values()
            left = [child.name for child in children if child.process.poll() is None]
            show(
                console,
                f"{name}: stopping {', '.join(left)} (at most {grace_s:.0f} s); finished work is "
                "in the journal",
            )
            if controller := self.supervisor.children.get("controller"):
                with contextlib.suppress(ProcessLookupError):
                    controller.process.send_signal(signal.SIGINT)  # do not wait for a checkpoint
        processes.stop(self.supervisor.processes, grace_s)

    def wait_for_workers(self) -> None:
        """Lets the workers end by themselves after a regular end, at the controller's order."""
        if self.supervisor.failed or self.interrupted or self.preempted:
            return
        deadline = time.monotonic() + WORKER_EXIT_S
        while time.monotonic() < deadline:
            if all(process.poll() is not None for process in self.supervisor.processes):
                return
            time.sleep(0.1)

    def failure_text(self) -> str:
        """Returns the error line of the process that failed first, or else the end of its log."""
        failed, log = self.supervisor.failed, self.log_path(self.supervisor.failed)
        lead = f"{self.supervisor.reason}; last error: " if self.supervisor.reason else ""
        begin = self.log_begins[failed]
        if text := processes.error_text(log, begin):
            return f"{lead}{text}\n({failed} ended the run; its log: {log})"
        code = self.supervisor.children[failed].last_code
        lines = processes.log_end(log, begin)
        ends = [number for number, line in enumerate(lines) if TORCHRUN_REPORT in line]
        # a rank that a signal killed, such as the kernel's for want of memory, has logged no reason
        kills = [lines[number] for number in ends if "(exitcode: -" in lines[number]]
        tail = "\n".join([*lines[: ends[0] if ends else None][-LOG_TAIL_LINES:], *kills[:1]])
        return f"{lead}{failed} ended with exit code {code}; its log: {log}\n{tail}"


def show(console: Console, text: str) -> None:
    """Prints a line; a full disk below our output does not end the run."""
    with contextlib.suppress(OSError):
        console.print(text, soft_wrap=True, markup=False, highlight=False)
