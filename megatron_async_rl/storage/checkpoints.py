"""What a checkpoint is on disk, and which one to trust: no torch, so that controller and trainer both read it.

    run.dir/checkpoints/v000010/        what the trainer wrote: Megatron's distributed checkpoint, in whatever layout
                        digests.N.json  of the files that rank N wrote: name -> sha256
    run.dir/checkpoints/v000010.json    the manifest, written last and by the controller: version, journal, prompts

A folder without manifest is no checkpoint. The manifest ties weights and books together: the journal held all facts
up to `journal_seq` when it was written, so a journal that is shorter is not the one it belongs to.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from megatron_async_rl.errors import DataError
from megatron_async_rl.storage.files import digest, sync, write

FOLDER = "checkpoints"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int  # of the weights
    folder: str
    journal_seq: int  # facts in the journal, all on disk, when this was written
    prompts: int  # prompts admitted so far
    files: dict[str, str]  # name -> sha256 of every file in the folder


def folder_name(version: int) -> str:
    return f"v{version:06d}"


def write_digests(folder: Path, rank: int, names: Iterable[str]) -> None:
    """Digests of files that this rank has written, forced to disk with the files themselves."""
    digests = {}
    for name in names:
        digests[name] = digest(folder / name)
        sync(folder / name)
    write(folder / f"digests.{rank}.json", msgspec.json.encode(digests))


def commit(run_dir: Path, version: int, folder: str, journal_seq: int, prompts: int) -> Manifest:
    """Makes a written folder a checkpoint. Raises DataError when a file has no digest."""
    path = run_dir / FOLDER / folder
    files: dict[str, str] = {}
    for part in sorted(path.glob("digests.*.json")):
        files |= msgspec.json.decode(part.read_bytes(), type=dict[str, str])
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    names = {name for name in names if not re.fullmatch(r"digests\.\d+\.json", name)}
    if names != files.keys():
        raise DataError(
            f"checkpoint {path}: files and digests differ: {sorted(names ^ files.keys())}"
        )
    manifest = Manifest(version, folder, journal_seq, prompts, files)
    sync(path)
    write(run_dir / FOLDER / f"{folder}.json", msgspec.json.format(msgspec.json.encode(manifest)))
    return manifest


def manifests(run_dir: Path) -> list[Manifest]:
    """All checkpoints whose manifest can be read, newest first."""
    found = []
    for path in (run_dir / FOLDER).glob("v*.json"):
        with contextlib.suppress(
            msgspec.DecodeError, OSError
        ):  # a torn one is no checkpoint: the one before counts
            found.append(msgspec.json.decode(path.read_bytes(), type=Manifest))
    return sorted(found, key=lambda manifest: -manifest.version)


def damage(run_dir: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint's files; empty when all digests match. `part` of `parts` looks at its share."""
    folder = run_dir / FOLDER / manifest.folder
    for name, expected in sorted(manifest.files.items())[part::parts]:
        try:
            if digest(folder / name) != expected:
                return f"{folder / name} does not match its digest"
        except OSError as e:
            return f"{folder / name}: {e.strerror}"
    return ""


def prune(run_dir: Path, keep: int) -> int:
    """Removes all but the newest `keep` checkpoints. Returns the version of the oldest that is left; -1: none."""
    kept = manifests(run_dir)[:keep]
    names = {manifest.folder for manifest in kept}
    newest = kept[0].version if kept else -1
    for path in (run_dir / FOLDER).glob("v*"):
        version = re.match(r"v(\d+)", path.name)
        if path.name.split(".")[0] in names or (version and int(version[1]) > newest):
            continue  # kept, or being written
        if path.suffix == ".json":
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
    return kept[-1].version if kept else -1
