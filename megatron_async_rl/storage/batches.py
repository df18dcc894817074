"""The batch of one training step as a file, for `replay` and for run.mode = rollout_only.

An .npz of plain arrays: the samples' tokens one after another, the samples' lengths, and the
version that trains on them. With rollout.routing_replay also the experts, and how many numbers of
them each sample has.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import NO_EXPERTS, TrainSample
from megatron_async_rl.storage.files import sync

# errors of numpy and zipfile for an archive with changed bytes
_DAMAGES = (
    ValueError, KeyError, TypeError, EOFError, AttributeError, NotImplementedError, OverflowError,
    MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_FIELDS = {"ids": np.int32, "logprobs": np.float32, "versions": np.int32, "advantages": np.float32}


def save(path: Path, version: int, samples: list[TrainSample]) -> None:
    """Writes a batch; `path` appears when the file is complete, and is on disk on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(s.ids) for s in samples], np.int64)
    arrays: dict[str, Any] = {"version": np.int64(version), "lengths": lengths}
    for name, dtype in _FIELDS.items():
        arrays[name] = np.concatenate([np.empty(0, dtype), *(getattr(s, name) for s in samples)])
    if experts := [s.experts for s in samples if len(s.experts)]:
        arrays["experts"] = np.concatenate(experts)
        arrays["num_experts"] = np.array([len(s.experts) for s in samples], np.int64)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def load(path: Path) -> tuple[int, list[TrainSample]]:
    """Returns (version, samples). Raises DataError for a file that `save` did not write."""
    remedy = "give a file from batches/ or refused/ of a run"
    try:
        with np.load(path, allow_pickle=False) as file:
            version, lengths = int(file["version"]), np.asarray(file["lengths"])
            flat = {name: file[name].astype(dtype, casting="no") for name, dtype in _FIELDS.items()}
            experts = np.asarray(file.get("experts", NO_EXPERTS))
            num_experts = np.asarray(file.get("num_experts", np.zeros(len(lengths), np.int64)))
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}", remedy) from e
    except _DAMAGES as e:
        problem = str(e) if zipfile.is_zipfile(path) else "it is no .npz archive, or was cut off"
        raise DataError(f"{path} is not a saved batch: {problem}", remedy) from e
    sizes = [(array, lengths) for array in flat.values()] + [(experts, num_experts)]
    if lengths.shape != num_experts.shape or not all(_divide(*pair) for pair in sizes):
        raise DataError(f"{path} is not a saved batch: arrays and lengths do not match", remedy)
    parts: dict[str, Any] = {
        name: np.split(array, np.cumsum(lengths)[:-1]) for name, array in flat.items()
    }
    parts["experts"] = np.split(experts, np.cumsum(num_experts)[:-1])
    return version, [
        TrainSample(**{name: part[n] for name, part in parts.items()}) for n in range(len(lengths))
    ]


def _divide(flat: np.ndarray, lengths: np.ndarray) -> bool:
    """Returns whether the lengths divide a flat array of numbers completely."""
    return (
        flat.ndim == lengths.ndim == 1
        and flat.dtype.kind in "fiu"
        and lengths.dtype.kind == "i"
        and bool((lengths >= 0).all())
        and len(flat) == lengths.sum()
    )
