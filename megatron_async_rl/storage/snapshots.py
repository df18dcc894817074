"""The weights of a version as a Hugging Face folder: how it comes to be, and which one to trust. No torch: the controller
makes it whole, rollout workers and new servers read it.

    run.dir/weights/.v000012.0.partial/    being written: each weight source writes files of its own
    run.dir/weights/v000012.0/             whole: its manifest was written and forced to disk before the folder got its name
        config.json ...                    copied from model.path
        model-00001-00001.safetensors ...  source 1, bucket 1
        model.safetensors.index.json       tensor -> file
        manifest.json                      version, digest of every file, and of every tensor that an engine must then hold

The number after the version counts the times that the version was written, so that nothing is ever put in the place of a
folder that is being read. A crash leaves a `.partial`, which nobody reads and the next write removes. The last two whole
ones are kept, and those that a server is reading.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import FileEntry
from megatron_async_rl.storage.files import digest, sync, write

logger = logging.getLogger(__name__)
DigestKind = Literal["sha256", "tiles"]
FOLDER = "weights"
KEEP = 2
INDEX_FILE = "model.safetensors.index.json"
_MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"v(\d+)\.(\d+)")
_WEIGHT_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    files: dict[str, str]  # name -> sha256
    engine_tp: int  # the digests are of an engine of so many tensor-parallel ranks ...
    digest_kind: str  # ... that digests in this way (weights/digest.py)
    digests: dict[
        str, str
    ]  # "rank:engine tensor" -> digest, worked out by the trainer from the tensors in its memory


class Snapshot(msgspec.Struct, frozen=True):
    path: Path
    manifest: Manifest

    @property
    def version(self) -> int:
        return self.manifest.version


def digest_kind(config: Config) -> DigestKind:
    """Returns how the run's servers digest their tensors."""
    return "sha256" if config.on_cpu else "tiles"


def begin(run_dir: Path, version: int) -> Path:
    """An empty folder to write `version` into; what a crash left of earlier ones goes."""
    base = run_dir / FOLDER
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in base.glob(".*.partial"):
        shutil.rmtree(left)
    times = [
        int(match[2])
        for match in map(_NAME.fullmatch, _names(base))
        if match and int(match[1]) == version
    ]
    partial = base / f".v{version:06d}.{max(times, default=-1) + 1}.partial"
    partial.mkdir(mode=0o700)
    return partial


def commit(
    partial: Path, files: Iterable[FileEntry], manifest: Manifest, model_path: Path
) -> Snapshot:
    """Makes the folder whole and gives it its name. `manifest.files` is filled in here.

    Raises DataError when a file is missing or short, or a tensor is in two of them.
    """
    weight_map: dict[str, str] = {}
    digests, total = {}, 0
    for entry in files:
        path = partial / entry.name
        if not path.is_file() or path.stat().st_size != entry.num_bytes:
            raise DataError(
                f"{path} is not the file of {entry.num_bytes} bytes that its source wrote"
            )
        if twice := weight_map.keys() & set(entry.tensors):
            raise DataError(
                f"{path} holds {sorted(twice)[0]}, which {weight_map[sorted(twice)[0]]} holds too"
            )
        weight_map |= dict.fromkeys(entry.tensors, entry.name)
        digests[entry.name] = entry.sha256
        total += entry.num_bytes
    copy_settings(model_path, partial)
    write_index(partial, weight_map, total)
    for path in partial.iterdir():
        if path.name not in digests:
            sync(path)
            digests[path.name] = digest(path)
    manifest = msgspec.structs.replace(manifest, files=digests)
    write(partial / _MANIFEST_FILE, msgspec.json.encode(manifest))
    whole = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    partial.rename(whole)
    sync(whole.parent)
    return Snapshot(whole, manifest)


def copy_settings(model_path: Path, folder: Path) -> None:
    """Everything of a Hugging Face folder but its weights: config, generation config, tokenizer."""
    for file in model_path.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(file, folder / file.name)


def write_index(folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(index)))


def whole(run_dir: Path) -> list[Snapshot]:
    """All folders with a manifest that can be read, newest first."""
    base = run_dir / FOLDER
    found = []
    for name in _names(base):
        match = _NAME.fullmatch(name)
        if match and (snapshot := read(base / name)):
            found.append(((int(match[1]), int(match[2])), snapshot))
    return [snapshot for _, snapshot in sorted(found, key=lambda pair: pair[0], reverse=True)]


def version_of(path: Path) -> int:
    """By the folder's name."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def read(path: Path) -> Snapshot | None:
    """None: no manifest there that can be read."""
    try:
        return Snapshot(
            path, msgspec.json.decode((path / _MANIFEST_FILE).read_bytes(), type=Manifest)
        )
    except (OSError, msgspec.DecodeError):
        return None


def damage(snapshot: Snapshot) -> str:
    """What is wrong with the folder's files; empty when all digests match."""

    def wrong(entry: tuple[str, str]) -> str:
        path = snapshot.path / entry[0]
        try:
            return "" if digest(path) == entry[1] else f"{path} does not match its digest"
        except OSError as e:
            return f"{path}: {e.strerror}"

    with ThreadPoolExecutor(max_workers=4) as pool:  # sha256 lets go of the interpreter
        return next(filter(None, pool.map(wrong, snapshot.manifest.files.items())), "")


def hold(snapshot: Snapshot, name: str) -> Path | None:
    """The folder under a name of the holder's own, by links: it stays whatever is pruned, until it is released.

    None: it was removed just now.
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
    held = snapshot.path.parent / f".held-{name}"
    shutil.rmtree(held, ignore_errors=True)
    return held


def prune(run_dir: Path, in_use: Collection[Path] = (), keep: int = KEEP) -> None:
    """Removes all whole folders but the newest `keep` versions, and those in use."""
    found = whole(run_dir)
    versions = sorted({snapshot.version for snapshot in found}, reverse=True)[:keep]
    kept: set[int] = set()
    for snapshot in found:
        if snapshot.version in versions and snapshot.version not in kept:
            kept.add(snapshot.version)  # the newest writing of it
        elif snapshot.path not in in_use:
            remove(snapshot.path)


def remove(path: Path) -> None:
    """First its name goes, then its files: nobody finds half of it."""
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _names(base: Path) -> list[str]:
    return [path.name for path in base.iterdir() if path.is_dir()] if base.is_dir() else []
