"""How the trainer nodes agree on the trainer's incarnation: one file per node,
run.dir/trainer/NAME.

Each node writes its own file and reads all. The current incarnation is the largest number in any
file. A node that sees a rank die writes the next number; two nodes that see the same death write
the same one; a number never decreases. Each file has one writer, so no lock is needed that a lost
host could hold.

    a node writes number n        it has stopped its ranks of earlier incarnations and joins n
    all nodes have written n      trainer-0 adds the rendezvous address and port; all start ranks
    failed                        the run cannot continue, for the reason given: every node ends
    modification time of a file   the node's heartbeat; readers time it by their own clock
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

FOLDER = "trainer"


class TrainerIncarnation(msgspec.Struct, frozen=True):
    """The content of a node's file."""

    number: int = 0  # 0: the node has not started yet
    restarts: int = 0  # since it last was healthy; a death seen by several hosts counts once
    reason: str = ""  # why this incarnation began, or why the run failed
    failed: bool = False
    done: bool = False  # the node's ranks have ended successfully
    address: str = ""  # of the rendezvous; trainer-0's file only
    port: int = 0
    host: str = ""  # for people


@dataclass
class _Seen:
    at: float  # time.monotonic when the file was last seen to change
    content: TrainerIncarnation = field(default_factory=TrainerIncarnation)
    mtime_ns: int = 0


class IncarnationFiles:
    """One node's view of all files: `own` was written here, `of(name)` was read last."""

    def __init__(self, run_dir: Path, name: str, names: Sequence[str]) -> None:
        self._folder = run_dir / FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._path = self._folder / name
        self._seen = {other: _Seen(at=time.monotonic()) for other in names}
        self.name = name
        self.own = TrainerIncarnation()
        self._host = f"{socket.gethostname()}, process {os.getpid()}"

    def read(self) -> TrainerIncarnation:
        """Reads all files and returns the newest content."""
        for name, seen in self._seen.items():
            try:
                # opened each time: a network file system then asks its server
                with (self._folder / name).open("rb") as file:
                    mtime_ns = os.fstat(file.fileno()).st_mtime_ns
                    content = msgspec.json.decode(file.read(), type=TrainerIncarnation)
            except (OSError, msgspec.DecodeError):
                continue  # not there, or an error of a network file system, which may pass
            if mtime_ns != seen.mtime_ns:
                seen.content, seen.mtime_ns, seen.at = content, mtime_ns, time.monotonic()
        contents = [seen.content for seen in self._seen.values()]
        return max(contents, key=lambda content: (content.number, content.failed, content.restarts))

    def of(self, name: str) -> TrainerIncarnation:
        return self._seen[name].content

    def write(self, content: TrainerIncarnation) -> None:
        """Replaces this node's file atomically; on OSError the old content stays."""
        content = msgspec.structs.replace(content, host=self._host)
        temporary = self._path.with_name(f".{self.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(content))
        temporary.replace(self._path)
        self.own = content

    def heartbeat(self) -> None:
        """Updates the modification time, which needs no space on the disk."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def missing(self) -> list[str]:
        """Returns the nodes that have not joined this node's incarnation."""
        return [name for name, seen in self._seen.items() if seen.content.number < self.own.number]

    def silent(self, limit_s: float) -> list[str]:
        """Returns the other nodes, not done, without heartbeat for `limit_s`."""
        now = time.monotonic()
        return [
            name
            for name, seen in self._seen.items()
            if name != self.name and not seen.content.done and now - seen.at > limit_s
        ]
