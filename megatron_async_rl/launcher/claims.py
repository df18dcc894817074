"""Which launcher starts which process. Several may serve one run, on several hosts, and each starts again what it started.

A name belongs to the launcher that started it last: run.dir/launchers/<name> says who that is. So a worker whose host is
gone can be started elsewhere under its old name; should that host come back, its launcher finds the name taken.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

FOLDER = "launchers"


class Claims:
    """One launcher's view of them."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / FOLDER
        self._me = f"{socket.gethostname()}, process {os.getpid()} ({secrets.token_hex(4)})"

    def take(self, name: str) -> None:
        """The name is ours from here on, whoever had it."""
        self._folder.mkdir(exist_ok=True)
        temporary = self._folder / f".{name}.{os.getpid()}"
        temporary.write_text(self._me + "\n")
        temporary.replace(self._folder / name)

    def other(self, name: str) -> str:
        """The launcher that has taken the name from us; empty while it is ours, or nobody's."""
        owner = self.owner(name)
        return "" if owner == self._me else owner

    def owner(self, name: str) -> str:
        """The launcher that started it last; empty: nobody has."""
        try:
            return (self._folder / name).read_text().strip()
        except FileNotFoundError:
            return ""

    def elsewhere(self, role: str) -> int:
        """How many processes of that role other launchers have started."""
        names = [path.name for path in self._folder.glob(f"{role}*")]
        return sum(bool(self.other(name)) for name in names)


def run_key(run_dir: Path) -> bytes:
    """The controller's public key: another in each life of the run; empty while it is made."""
    try:
        return (run_dir / "keys" / "hub.key").read_bytes()
    except FileNotFoundError:
        return b""
