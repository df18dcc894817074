"""Snapshots: the weights of a version as a Hugging Face folder, and which folder can be trusted.

The weight sources write it, the controller commits it, rollout workers and new servers read it.

    run.dir/weights/.v000012.0.partial/    being written
    run.dir/weights/v000012.0/             committed: complete and forced to disk
        config.json ...                    copied from model.path
        model-00001-00001.safetensors ...  source 1, bucket 1
        model.safetensors.index.json       tensor -> file
        manifest.json                      digests of every file and of every engine tensor

The number after the version counts how often the version was written, so a folder that is being
read is never replaced. After a crash a `.partial` is left, which the next write removes. The newest
two versions are kept, and folders that a server is reading.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import FileEntry
from megatron_async_rl.storage.exported import DIGESTS_FILE
from megatron_async_rl.storage.files import digest, sync, write_atomic

DigestKind = Literal["sha256", "tiles"]
FOLDER = "weights"
KEEP = 2
_CONFIG_FILE = "config.json"
_INDEX_FILE = "model.safetensors.index.json"
_MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"v(\d+)\.(\d+)")
_WEIGHT_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


class SnapshotManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    files: dict[str, str]  # name -> sha256
    engine_tp: int  # tensor-parallel ranks of the servers that `digests` are for
    digest_kind: str  # DigestKind
    digests: dict[str, str]  # "rank:engine tensor" -> digest, computed from the trainer's memory
    # of config.json, by which servers load fp8 weights; none: they are not quantized
    quantization_config: dict[str, Any] = {}


class Snapshot(msgspec.Struct, frozen=True):
    path: Path
    manifest: SnapshotManifest

    @property
    def version(self) -> int:
        return self.manifest.version


def digest_kind(config: Config) -> DigestKind:
    """Returns how the run's servers digest their tensors."""
    return "sha256" if config.on_cpu else "tiles"


def begin(run_dir: Path, version: int) -> Path:
    """Creates an empty folder to write `version` into; removes those that a crash left."""
    base = run_dir / FOLDER
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in base.glob(".*.partial"):
        shutil.rmtree(old)
    counts = [count for _, (other, count) in _folders(run_dir) if other == version]
    partial = base / f".v{version:06d}.{max(counts, default=-1) + 1}.partial"
    partial.mkdir(mode=0o700)
    return partial


def commit(
    partial: Path, files: Iterable[FileEntry], manifest: SnapshotManifest, model_path: Path
) -> Snapshot:
    """Completes the folder and gives it its name. Fills in `manifest.files`.

    Raises DataError if a file is missing or truncated, or if two files have the same tensor.
    """
    weight_map: dict[str, str] = {}
    digests, total = {}, 0
    for entry in files:
        path = partial / entry.name
        if not path.is_file() or path.stat().st_size != entry.num_bytes:
            raise DataError(f"{path} is missing, or not the {entry.num_bytes} bytes that were sent")
        if duplicates := sorted(weight_map.keys() & set(entry.tensors)):
            other = weight_map[duplicates[0]]
            raise DataError(f"{path} holds {duplicates[0]}, which {other} holds too")
        weight_map |= dict.fromkeys(entry.tensors, entry.name)
        digests[entry.name] = entry.sha256
        total += entry.num_bytes
    copy_settings(model_path, partial)
    if manifest.quantization_config:
        path = partial / _CONFIG_FILE
        settings = msgspec.json.decode(path.read_bytes())
        settings["quantization_config"] = manifest.quantization_config
        path.write_bytes(msgspec.json.format(msgspec.json.encode(settings)))
    write_index(partial, weight_map, total)
    for path in partial.iterdir():
        if path.name not in digests:
            sync(path)
            digests[path.name] = digest(path)
    manifest = msgspec.structs.replace(manifest, files=digests)
    write_atomic(partial / _MANIFEST_FILE, msgspec.json.encode(manifest))
    committed = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    partial.rename(committed)
    sync(committed.parent)
    return Snapshot(committed, manifest)


def copy_settings(model_path: Path, folder: Path) -> None:
    """Copies all files of a Hugging Face folder but its weights: config.json, tokenizer, ..."""
    for file in model_path.iterdir():
        is_copied = not file.name.endswith(_WEIGHT_FILES) and file.name != DIGESTS_FILE
        if file.is_file() and is_copied:
            shutil.copyfile(file, folder / file.name)


def write_index(folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Writes the index of a Hugging Face folder. `weight_map`: tensor -> file name."""
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / _INDEX_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(index)))


def list_snapshots(run_dir: Path) -> list[Snapshot]:
    """Returns all committed snapshots with a readable manifest, newest first."""
    folders = sorted(_folders(run_dir), key=lambda folder: folder[1], reverse=True)
    return [snapshot for path, _ in folders if (snapshot := read(path))]


def version_of(path: Path) -> int:
    """Returns the version in a folder's name."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def read(path: Path) -> Snapshot | None:
    """Returns None if the folder has no readable manifest."""
    try:
        encoded = (path / _MANIFEST_FILE).read_bytes()
        return Snapshot(path, msgspec.json.decode(encoded, type=SnapshotManifest))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def find_damage(snapshot: Snapshot) -> str:
    """Returns a problem of the snapshot's files, or an empty text if all digests match."""

    def check(entry: tuple[str, str]) -> str:
        path = snapshot.path / entry[0]
        try:
            return "" if digest(path) == entry[1] else f"{path} does not match its digest"
        except OSError as e:
            return f"{path}: {e.strerror}"

    with ThreadPoolExecutor(max_workers=4) as pool:  # sha256 releases the interpreter lock
        return next(filter(None, pool.map(check, snapshot.manifest.files.items())), "")


def hold(snapshot: Snapshot, name: str) -> Path | None:
    """Returns a folder of hard links for reader `name`, which pruning does not remove.

    It stays until `release`. Returns None if the snapshot has just been removed.
    """
    held = release(snapshot, name)
    held.mkdir(mode=0o700)
    try:
        for file in (*snapshot.manifest.files, _MANIFEST_FILE):
            (held / file).hardlink_to(snapshot.path / file)
    except FileNotFoundError:
        shutil.rmtree(held)
        return None
    return held


def release(snapshot: Snapshot, name: str) -> Path:
    """Removes the folder that `hold` made for reader `name`, and returns its path."""
    held = snapshot.path.parent / f".held-{name}"
    shutil.rmtree(held, ignore_errors=True)
    return held


def prune(run_dir: Path, in_use: Collection[Path] = (), keep: int = KEEP) -> None:
    """Removes all snapshots but the newest `keep` versions and those in use."""
    found = list_snapshots(run_dir)
    versions = sorted({snapshot.version for snapshot in found}, reverse=True)[:keep]
    for snapshot in found:
        if snapshot.version in versions:
            versions.remove(snapshot.version)  # keeps the one that was written last
        elif snapshot.path not in in_use:
            remove(snapshot.path)


def remove(path: Path) -> None:
    """Removes a snapshot. It is renamed first, so no reader finds a part of it."""
    renamed = path.with_name(f".{path.name}.partial")
    shutil.rmtree(renamed, ignore_errors=True)
    path.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def _folders(run_dir: Path) -> list[tuple[Path, tuple[int, int]]]:
    """Returns the committed folders with (version, number of the writing)."""
    base = run_dir / FOLDER
    paths = [path for path in base.iterdir() if path.is_dir()] if base.is_dir() else []
    named = [(path, _NAME.fullmatch(path.name)) for path in paths]
    return [(path, (int(match[1]), int(match[2]))) for path, match in named if match]
