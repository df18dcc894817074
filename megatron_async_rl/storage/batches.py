"""The batch of one training step as a file, for `replay` and for run.mode = rollout_only.

An .npz of plain arrays: the samples' tokens one after another, the samples' lengths, and the
version that trains on them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import TrainSample

_FIELDS = {"ids": np.int32, "logprobs": np.float32, "versions": np.int32, "advantages": np.float32}


def save(path: Path, version: int, samples: list[TrainSample]) -> None:
    """Writes a batch; `path` appears when the file is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(s.ids) for s in samples], np.int64)
    arrays: dict[str, Any] = {"version": np.int64(version), "lengths": lengths}
    for name, dtype in _FIELDS.items():
        arrays[name] = np.concatenate([np.empty(0, dtype), *(getattr(s, name) for s in samples)])
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)


def load(path: Path) -> tuple[int, list[TrainSample]]:
    """Returns (version, samples). Raises DataError for a file that `save` did not write."""
    remedy = "give a file from batches/ or refused/ of a run"
    try:
        with np.load(path, allow_pickle=False) as file:
            version, lengths = int(file["version"]), file["lengths"]
            flat = {name: file[name].astype(dtype, casting="no") for name, dtype in _FIELDS.items()}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"{path} is not a saved batch: {e}", remedy) from e
    if lengths.ndim != 1 or any(len(array) != lengths.sum() for array in flat.values()):
        raise DataError(f"{path} is not a saved batch: arrays and lengths do not match", remedy)
    ends = np.cumsum(lengths)
    return version, [
        TrainSample(**{name: array[end - length : end] for name, array in flat.items()})
        for length, end in zip(lengths, ends, strict=True)
    ]
