"""Claims: which launcher owns which process name of a run; one file per name,
run.dir/launchers/NAME.

Several launchers, on several hosts, may serve one run, and each restarts only the processes it
owns. The launcher that started a name last owns it. So a worker of a lost host can be started
elsewhere under its old name; if the host returns, its launcher finds the name claimed by another
and leaves it alone.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
from pathlib import Path

FOLDER = "launchers"


class Claims:
    """The claims on a run, as seen by one launcher."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / FOLDER
        self._own_id = f"{socket.gethostname()}, process {os.getpid()} ({secrets.token_hex(4)})"

    def take(self, name: str) -> None:
        """Claims the name, whether or not another launcher owns it."""
        self._folder.mkdir(exist_ok=True)
        temporary = self._folder / f".{name}.{os.getpid()}"
        temporary.write_text(self._own_id + "\n")
        temporary.replace(self._folder / name)

    def owner(self, name: str) -> str:
        """Returns the launcher that owns the name, or "" if it was never claimed."""
        try:
            return (self._folder / name).read_text().strip()
        except FileNotFoundError:
            return ""

    def other_owner(self, name: str) -> str:
        """Returns the other launcher that owns the name, or "" if there is none."""
        owner = self.owner(name)
        return "" if owner == self._own_id else owner

    def count_elsewhere(self, role: str) -> int:
        """Returns how many processes of a role other launchers own."""
        return sum(bool(self.other_owner(path.name)) for path in self._folder.glob(f"{role}*"))


def lock_path(run_dir: Path) -> Path:
    """Returns the file that `run` locks for as long as it owns run.dir."""
    return run_dir.with_name(f".{run_dir.name}.lock")


def has_launcher(run_dir: Path) -> bool:
    """Returns whether a `run` owns run.dir, on this host or on another that shares its locks."""
    try:
        with lock_path(run_dir).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def controller_key(run_dir: Path) -> bytes:
    """Returns the controller's public key, new at each `run`; empty while it is being made."""
    try:
        return (run_dir / "keys" / "hub.key").read_bytes()
    except FileNotFoundError:
        return b""
