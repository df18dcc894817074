"""The lives of a trainer on several hosts, as its nodes tell each other of them: run.dir/trainer/NAME, a file each.

A node writes its own file and reads all. The trainer's life is the largest number that any of them says: whoever sees a
rank die begins the next life by writing its number, two who see the same death write the same one, and it never goes
back. No file has two writers, so there is no lock that a lost host could keep.

    a node says life n         it takes part in it: what it had of the lives before is stopped
    all of them say life n     trainer-0 adds the address and port where the ranks meet, and all start theirs
    failed                     the run cannot go on, for the reason given: every node ends with it
    a file's time of change    the node's sign of life (seen to change, by the reader's own clock)
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


class TrainerGeneration(msgspec.Struct, frozen=True):
    """What one node says."""

    life: int = 0  # 0: it has not been there yet
    restarts: int = (
        0  # of the trainer since it was healthy: one a life, however many hosts saw the death
    )
    why: str = ""  # what began this life, or ended the run
    failed: bool = False
    done: bool = False  # its ranks have ended well
    address: str = ""  # trainer-0's alone
    port: int = 0
    host: str = ""  # for people


@dataclass
class _Seen:
    at: float  # when we saw it so, time.monotonic
    said: TrainerGeneration = field(default_factory=TrainerGeneration)
    changed: int = 0  # the file's mtime_ns


class GenerationFiles:
    """One node's view of all."""

    def __init__(self, run_dir: Path, name: str, names: Sequence[str]) -> None:
        self._folder = run_dir / FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._path = self._folder / name
        self._seen = {other: _Seen(at=time.monotonic()) for other in names}
        self.name = name
        self.own = (
            TrainerGeneration()
        )  # as this process said; what an earlier one said under the name is in `of`
        self._host = f"{socket.gethostname()}, process {os.getpid()}"

    def look(self) -> TrainerGeneration:
        """Reads what all say. Returns the trainer's life: the newest word of any node."""
        for name, seen in self._seen.items():
            try:
                with (self._folder / name).open(
                    "rb"
                ) as file:  # anew: a network file system then asks its server
                    changed = os.fstat(file.fileno()).st_mtime_ns
                    said = msgspec.json.decode(file.read(), type=TrainerGeneration)
            except (FileNotFoundError, msgspec.DecodeError):
                continue
            if changed != seen.changed:
                seen.said, seen.changed, seen.at = said, changed, time.monotonic()
        words = [seen.said for seen in self._seen.values()]
        return max(words, key=lambda said: (said.life, said.failed, said.restarts))

    def of(self, name: str) -> TrainerGeneration:
        return self._seen[name].said

    def say(self, life: TrainerGeneration) -> None:
        """Our word, whole or not at all. Raises OSError, with the one before in force, when it cannot be written."""
        life = msgspec.structs.replace(life, host=self._host)
        temporary = self._path.with_name(f".{self.name}.{os.getpid()}")
        with os.fdopen(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb"
        ) as file:
            file.write(msgspec.json.encode(life))
        temporary.replace(self._path)
        self.own = life

    def beat(self) -> None:
        """We are there. Needs no room on the disk."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def absent(self) -> list[str]:
        """The nodes that do not take part in our life yet."""
        return [name for name, seen in self._seen.items() if seen.said.life < self.own.life]

    def silent(self, limit_s: float) -> list[str]:
        """The others that are not done and gave no sign of life for so long."""
        now = time.monotonic()
        others = [
            (name, seen)
            for name, seen in self._seen.items()
            if name != self.name and not seen.said.done
        ]
        return [name for name, seen in others if now - seen.at > limit_s]
