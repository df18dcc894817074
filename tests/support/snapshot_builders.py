"""Parts of weight snapshots, as one weight source writes them."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_async_rl.protocol.types import FileEntry
from megatron_async_rl.weights.bucket import plan_buckets
from megatron_async_rl.weights.disk import SnapshotWriter
from megatron_async_rl.weights.reshard import TensorInfo

NUM_TENSORS = 12


def part_tensors(version: int, part: int) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"{part}.{n}", torch.full((300, 5), float(version * 1000 + n))) for n in range(NUM_TENSORS)
    ]


def write_part(partial: Path, version: int, part: int) -> list[FileEntry]:
    """Writes the tensors of one part in several buckets; returns the files."""
    named = part_tensors(version, part)
    plan = plan_buckets([TensorInfo(n, tuple(t.shape), t.dtype, n) for n, t in named], 20_000)
    writer = SnapshotWriter(partial, part)
    writer.write(plan, iter(named), torch.device("cpu"), None)
    assert not writer.error and len(writer.files) == len(plan) > 3
    return writer.files
