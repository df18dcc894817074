"""The job under test: a launcher on host A and, with two hosts, one on host B.

The launcher on host B starts the rollout worker.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from chaos_parts.namespaces import HOST_A, Namespaces
from megatron_async_rl import processes
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, last_seq
from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.status import FINAL_STATES, read_status

START_S = 240.0
STEPS = 100_000  # more than a job ever reaches
SETTINGS = (  # timeouts short enough to wait for
    f"run.steps={STEPS}",
    "faults.heartbeat_timeout_s=8",
    "faults.restart_backoff_s=0.2",
    "faults.max_restarts=50",
    "rollout.lease_timeout_s=20",
    "rollout.workflow=chaos_parts.workflow:Poisoned",
    "weights.update_timeout_s=15",
    "checkpoint.every=2",
)


class Job:
    def __init__(
        self,
        config: Path,
        run_dir: Path,
        overrides: Sequence[str],
        namespaces: Namespaces,
        two_hosts: bool,
        seed: int,
    ) -> None:
        self.run_dir = run_dir
        self.namespaces = namespaces
        self.two_hosts = two_hosts
        self.random = random.Random(seed)
        self._config = config
        self._overrides = list(overrides)
        self._launchers: list[subprocess.Popen[bytes]] = []
        self._out = run_dir.with_suffix(".out")

    # ---- start and end

    def start(self, *settings: str) -> None:
        """Starts the job, or resumes it."""
        environment = self.namespaces.environment()
        elsewhere = ("--elsewhere", "rollout-0") if self.two_hosts else ()
        hosts = (f"run.host={HOST_A}",) if self.two_hosts else ()
        common = (f"run.dir={self.run_dir}", *SETTINGS, *hosts, *self._overrides, *settings)
        resumes = (self.run_dir / JOURNAL_FILE).exists()
        (self.run_dir / "status.json").unlink(missing_ok=True)  # of the previous start
        fresh = () if resumes else ("--from-scratch",)
        command = ["run", str(self._config), *fresh, *elsewhere, *common]
        interface = {"GLOO_SOCKET_IFNAME": "a0"} if self.two_hosts else {}
        self._launchers = [self._launch([], command, environment | interface)]
        if self.two_hosts:
            deadline = time.monotonic() + START_S
            while not (self.run_dir / "status.json").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            command = ["join", str(self.run_dir), "rollout-0"]
            on_b = ["ip", "netns", "exec", "b"]
            self._launchers.append(
                self._launch(on_b, command, environment | {"GLOO_SOCKET_IFNAME": "b0"})
            )

    def _launch(
        self, prefix: list[str], command: list[str], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """The launcher ends with this process, however that ends."""
        return processes.start(
            [*prefix, sys.executable, "-m", "megatron_async_rl", *command], self._out, environment
        )

    def try_start(self, setting: str) -> tuple[int, str]:
        """Returns exit code and error output of a start that must fail."""
        command = [
            sys.executable,
            "-m",
            "megatron_async_rl",
            "run",
            str(self._config),
            f"run.dir={self.run_dir}",
        ]
        done = subprocess.run(
            [*command, *SETTINGS, *self._overrides, setting],
            env={**os.environ, **self.namespaces.environment()},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stderr

    @property
    def launcher(self) -> subprocess.Popen[bytes]:
        return self._launchers[0]

    def terminate(self) -> list[int]:
        """Sends SIGTERM as a scheduler would; returns the exit codes of the launchers."""
        self.launcher.send_signal(signal.SIGTERM)
        return [launcher.wait(120) for launcher in self._launchers]

    def kill(self) -> None:
        for launcher in self._launchers:
            launcher.kill()
            launcher.wait()

    def requeue(self) -> None:
        """Terminates the job, checks that its exit code asks for a requeue, and resumes it."""
        code = self.terminate()[0]
        if code != processes.EXIT_REQUEUE:
            raise RuntimeError(f"exit code {code} instead of {processes.EXIT_REQUEUE}")
        self.check_no_process_left()
        self.start()

    def check_no_process_left(self) -> None:
        """Raises RuntimeError unless all processes on both hosts, except this tool, have ended."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            left = [p for p in self._all_processes() if p.pid not in (os.getpid(), os.getppid())]
            if not left:
                return
            time.sleep(0.2)
        raise RuntimeError(f"left behind: {[(p.pid, p.cmdline()) for p in left]}")

    def _all_processes(self) -> list[psutil.Process]:
        networks = {
            path.stat().st_ino
            for path in (Path("/proc/self/ns/net"), Path("/run/netns/b"))
            if path.exists()
        }
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                ours = Path(f"/proc/{process.pid}/ns/net").stat().st_ino in networks
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    # ---- progress

    @property
    def version(self) -> int:
        """The trained version, -1 while the job does not train."""
        with contextlib.suppress(DataError):
            status = read_status(self.run_dir)
            return status.version if status.state == "training" else -1
        return -1

    @property
    def seq(self) -> int:
        return last_seq(self.run_dir / JOURNAL_FILE)

    def wait_for_version(self, version: int, limit_s: float) -> float | None:
        """Returns the seconds until the job has trained that version, None if it does not."""
        started = time.monotonic()
        while time.monotonic() - started < limit_s:
            if self.version >= version:
                return time.monotonic() - started
            if self.launcher.poll() is not None:
                return None
            time.sleep(0.1)
        return None

    def wait_for_update(self) -> None:
        """Returns when a server is receiving weights, or after ten seconds."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(DataError):
                if any(server.state == "updating" for server in read_status(self.run_dir).fleet):
                    return
            time.sleep(0.01)

    def has_ended(self) -> bool:
        with contextlib.suppress(DataError):
            return read_status(self.run_dir).state in FINAL_STATES
        return False

    # ---- processes

    def find(self, *words: str) -> list[psutil.Process]:
        """Returns the processes with all these words on their command line."""
        found = []
        for launcher in self._launchers:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(launcher.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        line = " ".join(process.cmdline())
                        if all(word in line for word in words):
                            found.append(process)
        return found

    def one(self, *words: str) -> psutil.Process:
        deadline = time.monotonic() + 60
        while not (found := self.find(*words)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no process with {words} on its command line")
            time.sleep(0.2)
        return self.random.choice(found)
