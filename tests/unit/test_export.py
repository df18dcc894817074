"""Exports of the policy on a full disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from model_shapes import tiny_shape

from megatron_async_rl.errors import DataError
from megatron_async_rl.model.families import FAMILIES
from megatron_async_rl.trainer.checkpoint.export import export_hf


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_export_that_the_disk_cannot_hold_is_refused_before_it_is_written(
    one_rank: None, tmp_path: Path
) -> None:
    source, out = tmp_path / "model", tmp_path / "policy"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    out.mkdir()  # an earlier export stays
    shape = tiny_shape(FAMILIES[0], padded=1 << 50)
    with pytest.raises(DataError, match=r"policy is not exported: it needs [\d,]+ bytes, the disk"):
        export_hf([], shape, source, out)
    assert out.is_dir()
