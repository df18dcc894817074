"""Saved batches on disk, and the comparison of gradients that `selftest` makes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from train_samples import make_train_samples

from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.storage import batches
from megatron_async_rl.trainer.selftest import compare


def equal_samples(got: list[TrainSample], want: list[TrainSample]) -> bool:
    fields = TrainSample.__struct_fields__
    return len(got) == len(want) and all(
        np.array_equal(getattr(a, f), getattr(b, f), equal_nan=f == "advantages")
        for a, b in zip(got, want, strict=True)
        for f in fields
    )


@pytest.mark.parametrize("count", [0, 1, 16])
@pytest.mark.parametrize("dtype", [None, np.uint8, np.uint16])
def test_saved_batch_is_read_back(tmp_path: Path, count: int, dtype: type | None) -> None:
    samples = make_train_samples(count)
    if dtype:  # all but the first have the experts that the engine chose
        samples[1:] = [
            msgspec.structs.replace(s, experts=np.arange(6 * len(s.ids), dtype=dtype))
            for s in samples[1:]
        ]
    batches.save(tmp_path / "new" / "b.npz", 7, samples)
    version, got = batches.load(tmp_path / "new" / "b.npz")
    assert version == 7 and equal_samples(got, samples)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["b.npz"]


def test_file_that_is_not_a_saved_batch_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "pickle.npz", version=1, lengths=np.array([{}], object))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    batches.save(tmp_path / "cut.npz", 7, make_train_samples(3))
    with np.load(tmp_path / "cut.npz") as file:
        arrays = dict(file)
    total = len(arrays["ids"])
    wrong: dict[str, dict[str, Any]] = {
        "cut": {"lengths": np.array([1, 2, 3])},
        "negative": {"lengths": np.array([total, 2, -2])},
        "fractions": {"lengths": np.array([total - 3.0, 1.5, 1.5])},
        "number": {"experts": np.uint8(1), "num_experts": np.array([1, 0, 0])},
        "texts": {"experts": np.array(["a"]), "num_experts": np.array([1, 0, 0])},
    }
    for name, changes in wrong.items():
        np.savez(tmp_path / f"{name}.npz", **arrays | changes)
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match="is not a saved batch"):
            batches.load(path)
    with pytest.raises(DataError, match=r"missing\.npz cannot be read: No such file"):
        batches.load(tmp_path / "missing.npz")


def test_damaged_batch_is_refused_or_read_unchanged(tmp_path: Path) -> None:
    path, draw, refused = tmp_path / "b.npz", random.Random(2), 0
    samples = make_train_samples(3)
    batches.save(path, 3, samples)
    original = path.read_bytes()
    for _ in range(300):
        content = bytearray(original)
        at = draw.randrange(len(content))
        if draw.random() < 0.2:
            del content[at:]
        else:
            content[at] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            version, got = batches.load(path)
            assert version == 3 and equal_samples(got, samples)
        except DataError as e:
            refused += 1
            assert str(path) in str(e) and "\n" not in str(e)
    assert refused > 200


def test_selftest_names_the_first_parameter_that_differs() -> None:
    want = {"a": np.ones(3), "b": np.array([1.0, -4.0]), "c": np.zeros(2)}
    got = {"a": np.ones(3), "b": np.array([1.0, -3.9]), "c": np.full(2, 0.5)}
    assert compare(got, want) == [("a", 0.0), ("b", pytest.approx(0.025)), ("c", 0.5)]
    assert compare({}, {"a": np.ones(1)}) == [("a", float("inf"))]
