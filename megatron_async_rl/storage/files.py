"""Files on disk: durable atomic writes, and digests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from megatron_async_rl.errors import DataError

T = TypeVar("T")


def digest(path: Path) -> str:
    """Returns the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, kind: type[T], lost: str, remedy: str) -> T:
    """Returns the content of a JSON file. Raises DataError, which names the loss, if damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as e:
        problem = f"cannot be read: {e.strerror}"
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        problem = f"is damaged: {e}"
    raise DataError(f"{path} {problem}; lost: {lost}", remedy)


def read_digests(path: Path, lost: str, remedy: str) -> dict[str, str]:
    """Returns name -> digest as read_json, {} if there is no such file."""
    return read_json(path, dict[str, str], lost, remedy) if path.exists() else {}


def sync(path: Path) -> None:
    """Forces a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file durably. After a crash the path has the old content or all of the new."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)
