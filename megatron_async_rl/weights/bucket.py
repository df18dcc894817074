"""Packs tensors into buckets: one broadcast instead of hundreds.

Buckets are planned from names, shapes and element types alone, so both ends know every bucket
before a byte is sent. A bucket has one element type, or fp8 and the float32 of its scales, which
keeps its tensors aligned (an fp8 tensor is whole blocks of 16 KiB), and never splits a Megatron
parameter: tensors that the server fuses (q, k, v; gate, up) are adjacent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from megatron_async_rl.protocol.weight_messages import Bucket, TensorSpec
from megatron_async_rl.weights.reshard import TensorInfo


def plan_buckets(tensors: Iterable[TensorInfo], bucket_bytes: int) -> list[Bucket]:
    """Groups parameters in order into buckets of at most `bucket_bytes`.

    A parameter that is larger gets a bucket of its own.
    """
    buckets: list[Bucket] = []
    bucket: list[TensorSpec] = []
    size = 0
    for _, infos in groupby(tensors, lambda info: info.bucket):
        specs = [
            TensorSpec(info.name, str(info.dtype).removeprefix("torch."), list(info.shape))
            for info in infos
        ]
        added = sum(map(_num_bytes, specs))
        if bucket and (size + added > bucket_bytes or specs[0].dtype != bucket[0].dtype):
            buckets.append(Bucket(bucket))
            bucket, size = [], 0
        bucket += specs
        size += added
    if bucket:
        buckets.append(Bucket(bucket))
    return buckets


def split_bucket(bucket: Bucket, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields the bucket's tensors by name, as views of its bytes `flat` ([bucket bytes] uint8)."""
    offset = 0
    for spec in bucket.tensors:
        end = offset + _num_bytes(spec)
        yield spec.name, _view(flat[offset:end], spec)
        offset = end


def fill_buckets(
    plan: list[Bucket], tensors: Iterable[tuple[str, Tensor]], device: torch.device
) -> Iterator[tuple[Bucket, Tensor]]:
    """Yields the planned buckets in order, each with its bytes: [bucket bytes] uint8.

    Two buffers alternate: a yielded one may be used until the bucket after the next is requested.
    Raises ValueError if `tensors` do not come in the planned order, which is a bug.
    """
    largest = max((sum(map(_num_bytes, bucket.tensors)) for bucket in plan), default=0)
    buffers = [
        torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(2, len(plan)))
    ]
    source = iter(tensors)
    for number, bucket in enumerate(plan):
        buffer, offset = buffers[number % 2], 0
        for spec in bucket.tensors:
            name, tensor = next(source, ("no tensor", torch.empty(0)))
            if (name, list(tensor.shape)) != (spec.name, spec.shape):
                raise ValueError(
                    f"expected {spec.name} {spec.shape} next, got {name} {list(tensor.shape)}"
                )
            end = offset + _num_bytes(spec)
            _view(buffer[offset:end], spec).copy_(tensor)
            offset = end
        yield bucket, buffer[:offset]


def _num_bytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * getattr(torch, spec.dtype).itemsize


def _view(raw: Tensor, spec: TensorSpec) -> Tensor:
    return raw.view(getattr(torch, spec.dtype)).view(spec.shape)
