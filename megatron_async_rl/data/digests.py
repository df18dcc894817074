"""Digests of the datasets of a run: a resumed run must have the same rows, in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.config.datasets import SourceConfig
from megatron_async_rl.data.sources import data_files, evaluation_sources, training_sources
from megatron_async_rl.storage import files

DIGESTS_FILE = "dataset.json"  # in run.dir


def record_data(run_dir: Path, config: Config) -> None:
    """Keeps the digests of the datasets in the run, for `changed_data` at its next start."""
    digests = {setting: _digest(source, config) for setting, source in _sources(config)}
    files.write_atomic(run_dir / DIGESTS_FILE, msgspec.json.encode(digests))


def changed_data(run_dir: Path, config: Config) -> str:
    """Returns the dataset that has changed since the last start of the run, "" if none has.

    Raises DataError if the digests are damaged.
    """
    recorded = read_digests(run_dir)
    for setting, source in _sources(config):
        if setting in recorded and recorded[setting] != _digest(source, config):
            return (
                f"{setting} = {source.path} has other content than when the run in {run_dir} was "
                "started; restore it, choose another run.dir, or start over with --from-scratch"
            )
    return ""


def read_digests(run_dir: Path) -> dict[str, str]:
    """Returns setting -> digest, {} if none were recorded. Raises DataError."""
    lost = "the proof that the datasets have not changed since the run was started"
    return files.read_digests(
        run_dir / DIGESTS_FILE, lost, "delete it to continue without this proof"
    )


def _sources(config: Config) -> Iterator[tuple[str, SourceConfig]]:
    yield from training_sources(config)
    yield from evaluation_sources(config)


def _digest(source: SourceConfig, config: Config) -> str:
    """Returns the digest of a source's file, or of the names and contents of all its files."""
    paths = data_files(source, config)
    if paths == [Path(source.path)]:
        return files.digest(paths[0])
    whole = hashlib.sha256()
    for path in paths:
        whole.update(f"{path.relative_to(source.path)} {files.digest(path)}\n".encode())
    return whole.hexdigest()
