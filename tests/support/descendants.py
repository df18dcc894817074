"""Finds the descendants of a process, and those that are left after its end."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import psutil

from megatron_async_rl.processes import LAUNCHER_VARIABLE


class Descendants:
    """Records the process tree below `pid` while that runs.

    A process whose parents have ended is found by an environment variable of the run.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._mark = f"{LAUNCHER_VARIABLE}={pid}".encode()
        self._seen: frozenset[psutil.Process] = frozenset()
        self._lock = threading.Lock()  # the test looks too
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.is_set():
            self.look()
            self._over.wait(0.2)  # each look reads all of /proc

    def look(self) -> frozenset[psutil.Process]:
        """Returns all processes seen so far."""
        try:
            children = self._root.children(recursive=True)
        except psutil.NoSuchProcess:
            self._over.set()
            return self._seen
        with self._lock:
            self._seen |= frozenset(children)
            return self._seen

    @property
    def num_seen(self) -> int:
        return len(self._seen)

    def left(self, within_s: float = 30.0) -> list[str]:
        """Waits until no descendant is left; returns the command lines of those left at the end."""
        self._over.set()
        self._thread.join()
        deadline = time.monotonic() + within_s
        while (alive := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return alive

    def _alive(self) -> list[str]:
        return [line for process in self._seen | self._marked() if (line := _line(process))]

    def _marked(self) -> set[psutil.Process]:
        found = set()
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if folder.name.isdigit() and self._mark in (folder / "environ").read_bytes().split(
                    b"\0"
                ):
                    found.add(psutil.Process(int(folder.name)))
        return found


def _line(process: psutil.Process) -> str:
    try:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return f"{process.pid} (parent {process.ppid()}): {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return ""
