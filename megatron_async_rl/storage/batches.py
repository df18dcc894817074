"""A batch as a file: what the trainer is given for one step, to train it again with no fleet.

An .npz of plain arrays: the samples' tokens one after another, their lengths, and the version that trains on them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import TrainSample

_FIELDS = {"ids": np.int32, "logprobs": np.float32, "versions": np.int32, "advantages": np.float32}


def save(path: Path, version: int, samples: list[TrainSample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: np.concatenate([np.empty(0, dtype), *(getattr(s, name) for s in samples)])
        for name, dtype in _FIELDS.items()
    }
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            version=np.int64(version),
            lengths=np.array([len(s.ids) for s in samples], np.int64),
            **arrays,
        )
    temporary.replace(path)


def load(path: Path) -> tuple[int, list[TrainSample]]:
    """(version, samples). Raises DataError where it is not such a file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            version, lengths = int(file["version"]), file["lengths"]
            flat = {name: file[name].astype(dtype, casting="no") for name, dtype in _FIELDS.items()}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(
            f"{path} is not a saved batch: {e}; give a file that this program wrote"
        ) from e
    if lengths.ndim != 1 or any(len(a) != lengths.sum() for a in flat.values()):
        raise DataError(f"{path} is not a saved batch: its arrays and its lengths disagree")
    cuts = np.cumsum(lengths)[:-1]
    parts = {name: np.split(array, cuts) if len(lengths) else [] for name, array in flat.items()}
    return version, [
        TrainSample(**dict(zip(parts, values, strict=True)))
        for values in zip(*parts.values(), strict=True)
    ]
