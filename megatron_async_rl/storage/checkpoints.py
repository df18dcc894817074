"""Checkpoints on disk, and which of them can be trusted. Controller and trainer both read them.

    run.dir/checkpoints/v000010/        Megatron's distributed checkpoint, written by the trainer
                        digests.N.json  name -> sha256 of the files that rank N wrote
    run.dir/checkpoints/v000010.json    the manifest, written last and by the controller

A folder without a manifest, or with one that does not match its own digest, is ignored. The
manifest ties weights to the controller's state: the journal had `journal_seq` events when it was
written, so a shorter journal belongs to another run.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from megatron_async_rl.errors import DataError
from megatron_async_rl.storage import hook_digests
from megatron_async_rl.storage.files import digest, sync, write_atomic

FOLDER = "checkpoints"


class CheckpointManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int  # of the weights
    folder: str
    journal_seq: int  # events in the journal, all on disk, when this was written
    prompts: int  # prompts admitted until then
    files: dict[str, str]  # name -> sha256 of every file in the folder
    hooks: dict[str, str] = {}  # the user's hooks when it was written, see hook_digests.py
    sha256: str = ""  # of the other fields

    def digest(self) -> str:
        unsigned = msgspec.to_builtins(msgspec.structs.replace(self, sha256=""))
        if not self.hooks:
            del unsigned["hooks"]  # earlier manifests have no such field
        return hashlib.sha256(msgspec.json.encode(unsigned, order="sorted")).hexdigest()


def folder_name(version: int) -> str:
    return f"v{version:06d}"


def write_digests(folder: Path, rank: int, names: Iterable[str]) -> None:
    """Forces files that this rank wrote to the disk, and stores their digests beside them."""
    digests = {}
    for name in names:
        digests[name] = digest(folder / name)
        sync(folder / name)
    write_atomic(folder / f"digests.{rank}.json", msgspec.json.encode(digests))


def commit(
    run_dir: Path, version: int, folder: str, journal_seq: int, prompts: int
) -> CheckpointManifest:
    """Makes a written folder a checkpoint. Raises DataError if a file, or all, have no digest."""
    path = run_dir / FOLDER / folder
    files: dict[str, str] = {}
    for part in sorted(path.glob("digests.*.json")):
        files |= msgspec.json.decode(part.read_bytes(), type=dict[str, str])
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    names = {name for name in names if not re.fullmatch(r"digests\.\d+\.json", name)}
    if names != files.keys():
        different = sorted(names ^ files.keys())
        raise DataError(f"checkpoint {path}: files and digests differ: {different}")
    if not names:
        raise DataError(f"checkpoint {path} has no files")
    hooks = hook_digests.read(run_dir)
    manifest = CheckpointManifest(version, folder, journal_seq, prompts, files, hooks)
    manifest = msgspec.structs.replace(manifest, sha256=manifest.digest())
    sync(path)
    encoded = msgspec.json.format(msgspec.json.encode(manifest))
    write_atomic(run_dir / FOLDER / f"{folder}.json", encoded)
    return manifest


def list_manifests(run_dir: Path) -> list[CheckpointManifest]:
    """Returns the checkpoints that have an intact manifest, newest first."""
    found = [manifest for _, manifest in _manifests(run_dir) if manifest]
    return sorted(found, key=lambda manifest: -manifest.version)


def damaged_manifests(run_dir: Path) -> list[Path]:
    """Returns the manifests that are damaged; their checkpoints are not used."""
    return sorted(path for path, manifest in _manifests(run_dir) if manifest is None)


def _manifests(run_dir: Path) -> Iterator[tuple[Path, CheckpointManifest | None]]:
    for path in (run_dir / FOLDER).glob("v*.json"):
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=CheckpointManifest)
        except FileNotFoundError:
            continue  # pruned just now
        except (msgspec.DecodeError, UnicodeDecodeError, OSError):
            yield path, None
        else:
            intact = manifest.sha256 == manifest.digest() and manifest.folder == path.stem
            yield path, manifest if intact else None


def find_damage(run_dir: Path, manifest: CheckpointManifest, part: int = 0, parts: int = 1) -> str:
    """Returns the first problem of a checkpoint's files, or an empty text if all digests match.

    With `parts` > 1 it checks only every `parts`-th file, from file number `part` on.
    """
    return next(find_all_damage(run_dir, manifest, part, parts), "")


def find_all_damage(
    run_dir: Path, manifest: CheckpointManifest, part: int = 0, parts: int = 1
) -> Iterator[str]:
    """Yields every problem of a checkpoint's files."""
    folder = run_dir / FOLDER / manifest.folder
    for name, expected in sorted(manifest.files.items())[part::parts]:
        try:
            if digest(folder / name) != expected:
                yield f"{folder / name} does not match its digest"
        except OSError as e:
            yield f"{folder / name}: {e.strerror}"


def prune(run_dir: Path, keep: int) -> int:
    """Removes all but the newest `keep` checkpoints.

    Returns the version of the oldest that is kept, or -1 if there is none.
    """
    kept = list_manifests(run_dir)[:keep]
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
