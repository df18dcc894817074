"""Tensors to flattened buckets: one broadcast instead of hundreds.

The plan is made from names, shapes and types alone, so both ends know every bucket before a byte moves. A bucket holds
one element type, which keeps every tensor in it aligned, and all tensors of a Megatron parameter (q, k and v; gate and
up): what the engine fuses again lies side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from megatron_async_rl.protocol.messages import Bucket, TensorSpec
from megatron_async_rl.weights.reshard import TensorInfo


def plan_buckets(tensors: Iterable[TensorInfo], bucket_bytes: int) -> list[Bucket]:
    """Groups parameters in order into buckets of at most `bucket_bytes`; a larger parameter goes alone."""
    buckets: list[Bucket] = []
    bucket: list[TensorSpec] = []
    size = 0
    for _, infos in groupby(tensors, lambda info: info.parameter):
        specs = [
            TensorSpec(info.name, str(info.dtype).removeprefix("torch."), list(info.shape))
            for info in infos
        ]
        more = sum(map(num_bytes, specs))
        if bucket and (size + more > bucket_bytes or specs[0].dtype != bucket[0].dtype):
            buckets.append(Bucket(bucket))
            bucket, size = [], 0
        bucket += specs
        size += more
    if bucket:
        buckets.append(Bucket(bucket))
    return buckets


def bucket_bytes(bucket: Bucket) -> int:
    return sum(map(num_bytes, bucket.tensors))


def split_bucket(bucket: Bucket, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The bucket's tensors by name, as views of its bytes `flat` ([bucket bytes] uint8)."""
    offset = 0
    for spec in bucket.tensors:
        end = offset + num_bytes(spec)
        yield spec.name, flat[offset:end].view(getattr(torch, spec.dtype)).view(spec.shape)
        offset = end


def fill_buckets(
    plan: list[Bucket], tensors: Iterable[tuple[str, Tensor]], device: torch.device
) -> Iterator[tuple[Bucket, Tensor]]:
    """The plan's buckets in order, each with its bytes: [bucket bytes] uint8.

    Two buffers take turns: a yielded one may be in use until the one after the next is asked for. `tensors` must come
    in the plan's order; anything else is a fault of ours and raises ValueError.
    """
    largest = max(map(bucket_bytes, plan), default=0)
    buffers = [
        torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(2, len(plan)))
    ]
    source = iter(tensors)
    for number, bucket in enumerate(plan):
        buffer, offset = buffers[number % 2], 0
        for spec in bucket.tensors:
            name, tensor = next(source, ("nothing", torch.empty(0)))
            if (name, list(tensor.shape)) != (spec.name, spec.shape):
                raise ValueError(
                    f"the plan has {spec.name} {spec.shape} next, got {name} {list(tensor.shape)}"
                )
            flat = buffer[offset : offset + num_bytes(spec)]
            flat.view(getattr(torch, spec.dtype)).view(spec.shape).copy_(tensor)
            offset += len(flat)
        yield bucket, buffer[:offset]


def num_bytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * getattr(torch, spec.dtype).itemsize
