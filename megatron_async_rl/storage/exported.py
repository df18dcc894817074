"""Digests of an exported Hugging Face folder: written by the trainer, compared by `audit`.

run.dir/policy/digests.json    name -> sha256 of every other file; written last
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from megatron_async_rl.errors import DataError
from megatron_async_rl.storage.files import digest, read_json, sync, write_atomic

DIGESTS_FILE = "digests.json"


def synced_digest(path: Path) -> str:
    """Forces a file to the disk; returns its sha256."""
    sync(path)
    return digest(path)


def write_digests(folder: Path, known: dict[str, str]) -> None:
    """Stores the digests of all files of a folder. `known`: those that are computed already."""
    names = {path.name for path in folder.iterdir()} - {DIGESTS_FILE}
    digests = {name: known.get(name) or synced_digest(folder / name) for name in sorted(names)}
    write_atomic(folder / DIGESTS_FILE, msgspec.json.format(msgspec.json.encode(digests)))


def find_damage(folder: Path) -> Iterator[str]:
    """Yields every file that is not the one that was exported."""
    try:
        digests = read_json(
            folder / DIGESTS_FILE, dict[str, str], "the proof that the export is whole", ""
        )
    except DataError as e:
        yield str(e)
        return
    for name, expected in digests.items():
        try:
            if digest(folder / name) != expected:
                yield f"{folder / name} does not match its digest"
        except OSError as e:
            yield f"{folder / name}: {e.strerror}"
