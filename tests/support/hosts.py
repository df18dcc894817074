"""Launchers of one run, each in a session of its own as on a host of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from descendants import Descendants
from paths import python_environment

from megatron_async_rl import processes

START_S = 240.0


class Host:
    """One launcher and the processes that it started."""

    def __init__(self, log: Path, *arguments: str, prefix: Sequence[str] = (), **env: str) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "megatron_async_rl", *arguments],
                env=python_environment(**env),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=processes.die_with_parent,
            )
        self.watch = Descendants(self.process.pid)

    def process_tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def freeze(self) -> None:
        for process in self.process_tree():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                process.suspend()

    def thaw(self) -> None:
        for process in self.process_tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def says(self, text: str) -> bool:
        assert self.process.poll() is None or text in self.log.read_text(), self.log.read_text()[
            -3000:
        ]
        return text in self.log.read_text()


def wait_until(condition: Callable[[], bool], limit_s: float = START_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
