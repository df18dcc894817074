"""Files that are whole or not there: written under another name, forced to disk, renamed, and the folder forced too."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_READ_BYTES = 1 << 22


def digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            sha.update(block)
    return sha.hexdigest()


def sync(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes) -> None:
    """The whole file or the one before, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)
