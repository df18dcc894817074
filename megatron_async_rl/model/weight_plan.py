"""How each weight travels from trainer to servers, planned without a GPU: `plan-weights`.

For every Hugging Face tensor a route names the trainer shards it is gathered from and the engine
tensor it becomes part of. The plan needs config.json and the two layouts only. `make` refuses
layouts that do not fit and verifies the map: each element of each engine rank is written exactly
once, and the trainer's shards cover each Hugging Face tensor without overlap.
"""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model import layout
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.engine import block_fp8, engine_layout
from megatron_async_rl.model.layout import Layout
from megatron_async_rl.model.shape import ModelShape, map_parameter, parameter_names

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of trainer.precision


class Route(msgspec.Struct, frozen=True):
    """One Hugging Face tensor. Ranges are half-open, along the named dimension."""

    tensor: str
    shape: list[int]
    parameter: str  # Megatron's, with global layer and expert numbers
    stage: int
    expert_rank: int  # -1: not an expert
    split: int | None  # dimension that the trainer splits
    shards: list[list[int]]  # [tensor-parallel rank, start, end] of the Hugging Face tensor
    engine_tensor: str
    part: int
    cut: int | None  # dimension that the engine splits
    pieces: list[list[int]]  # [engine rank, start, end] of the Hugging Face tensor


class Source(msgspec.Struct, frozen=True):
    """A weight source: a trainer rank that sends weights in its own update group."""

    stage: int
    expert_rank: int  # sends this rank's experts; 0 also sends everything else of the stage
    num_bytes: int
    buckets: int
    gather_bytes: int  # received from the ranks that hold other shards of its tensors


class Plan(msgspec.Struct, frozen=True):
    model: str
    trainer: dict[str, int]
    engine: dict[str, int]
    dtype: str
    total_bytes: int
    sources: list[Source]  # in the order in which a server takes their buckets
    peak_bytes: int  # on a source, in addition to the model: two buckets
    seconds: dict[str, float]
    routes: list[Route]


def make(config: Config, link_gb_s: float) -> Plan:
    """Plans a weight update. `link_gb_s`: bandwidth of one rank's link in 10^9 bytes/s.

    Raises ConfigError for a layout that does not fit the model, DataError for the model.
    """
    sizes = Layout.from_config(config)
    vocab_multiple = int(config.megatron.get("make_vocab_size_divisible_by", 1)) * sizes.tp
    shape = HfConfig(config.model.path).shape(vocab_multiple)
    layout.check(sizes, shape)
    with _gc_disabled():
        routes = [
            r for name in parameter_names(shape) for r in parameter_routes(name, shape, sizes)
        ]
        verify(routes, shape, sizes)
    dtype: str = config.weights.dtype
    if dtype == "as_trained":
        dtype = _DTYPES[config.trainer.precision]
    num_bytes: Counter[tuple[int, int]] = Counter()
    gathered: Counter[tuple[int, int]] = Counter()
    largest = 0
    for route in routes:
        count, source = prod(route.shape), (route.stage, max(route.expert_rank, 0))
        size = count * _sent_bytes(route.tensor, sizes, dtype)
        num_bytes[source] += size
        # before the source quantizes
        whole = count * _ELEMENT_BYTES[dtype]
        gathered[source] += whole * (len(route.shards) - 1) // len(route.shards)
        largest = max(largest, size)
    bucket_bytes, total = config.weights.bucket_bytes, num_bytes.total()
    link = link_gb_s * 1e9
    return Plan(
        model=config.model.path,
        trainer={k: getattr(sizes, k) for k in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")},
        engine={"tp": sizes.engine_tp, "servers": sizes.servers},
        dtype=f"{dtype} and fp8" if sizes.quantized else dtype,
        total_bytes=total,
        sources=[
            Source(*source, size, -(-size // bucket_bytes), gathered[source])
            for source, size in sorted(num_bytes.items())
        ],
        peak_bytes=2 * max(min(bucket_bytes, max(num_bytes.values())), largest),
        # a server receives from one source at a time; a source gathers while it sends
        seconds={"wire": total / link, "gather": max(gathered.values()) / link},
        routes=routes,
    )


def _sent_bytes(tensor: str, sizes: Layout, dtype: str) -> int:
    """Returns the bytes of an element as it is sent."""
    if tensor.endswith(block_fp8.SCALE_SUFFIX):
        return 4
    return 1 if sizes.quantized and block_fp8.is_quantized(tensor) else _ELEMENT_BYTES[dtype]


def parameter_routes(name: str, shape: ModelShape, sizes: Layout) -> Iterator[Route]:
    """Yields the routes of the Hugging Face tensors in one Megatron parameter.

    Scales of fp8 weights are computed from whole tensors: the trainer does not split them.
    """
    mapping, parts = map_parameter(name, shape), name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        stage = sizes.stage_of(int(parts[2]), shape.num_layers)
    else:
        stage = 0 if parts[0] == "embedding" else sizes.pp - 1
    expert_rank, ranks = -1, sizes.tp
    if "local_experts" in parts:
        expert = int(parts[parts.index("local_experts") + 1])
        expert_rank, ranks = expert // (shape.num_experts // sizes.ep), sizes.etp
    split = mapping.rule.split
    tensors = [(hf, full, split) for hf, full in mapping.pieces]
    if sizes.quantized:
        tensors += [
            (hf + block_fp8.SCALE_SUFFIX, block_fp8.scale_shape(full), None)
            for hf, full in mapping.pieces
            if block_fp8.is_quantized(hf)
        ]
    for hf, full, cut in tensors:
        shards = [[0, 0, full[0]]]
        if cut is not None:
            shards, first = [], 0
            for size in mapping.sections(shape) or (full[cut],):
                step = (shape.padded_vocab_size if mapping.in_vocabulary else size) // ranks
                bounds = [first + min(rank * step, size) for rank in range(ranks + 1)]
                shards += [[rank, bounds[rank], bounds[rank + 1]] for rank in range(ranks)]
                first += size
        slot = engine_layout.engine_slot(hf, shape)
        pieces = engine_layout.engine_pieces(slot.leaf, full, shape, sizes.engine_tp)
        yield Route(
            tensor=hf,
            shape=list(full),
            parameter=name,
            stage=stage,
            expert_rank=expert_rank,
            split=cut,
            shards=shards,
            engine_tensor=slot.tensor,
            part=slot.part,
            cut=engine_layout.engine_split(slot.leaf, len(full)),
            pieces=[list(piece) for piece in pieces],
        )


def verify(routes: list[Route], shape: ModelShape, sizes: Layout) -> None:
    """Raises ConfigError unless the routes write every element once (see the module's text)."""
    parts: dict[str, set[int]] = defaultdict(set)
    written: dict[tuple[str, int], int] = defaultdict(int)
    names: set[str] = set()
    for route in routes:
        _require(route.tensor not in names, f"{route.tensor} is sent twice")
        names.add(route.tensor)
        ends = [0, *(end for _, _, end in route.shards)]
        starts = [start for _, start, _ in route.shards]
        _require(
            starts == ends[:-1] and ends[-1] == route.shape[route.split or 0],
            f"the trainer's shards {route.shards} do not cover {route.tensor} {route.shape}",
        )
        received = parts[route.engine_tensor]
        _require(route.part not in received, f"{route.engine_tensor} gets part {route.part} twice")
        received.add(route.part)
        size = route.shape[route.cut or 0]
        row = prod(route.shape) // size
        for rank, start, end in route.pieces:
            _require(0 <= start <= end <= size, f"rank {rank} reads outside {route.tensor}")
            written[route.engine_tensor, rank] += (end - start) * row
    expected = dict(engine_layout.engine_sizes(shape, sizes.engine_tp))
    if sizes.quantized:
        quantized = {r.engine_tensor for r in routes if block_fp8.is_quantized(r.tensor)}
        expected |= {
            name + block_fp8.SCALE_SUFFIX: [n // block_fp8.BLOCK**2 for n in expected[name]]
            for name in quantized & expected.keys()
        }
    missing = sorted(expected.keys() - parts.keys())[:3]
    _require(parts.keys() == expected.keys(), f"engine tensors without a source: {missing}")
    for name, rank_sizes in expected.items():
        received = parts[name]
        complete = received == set(range(len(received)))
        _require(complete, f"{name} gets parts {sorted(received)} only")
        for rank, size in enumerate(rank_sizes):
            _require(
                written[name, rank] == size,
                f"engine rank {rank} holds {size} elements of {name}, {written[name, rank]} are "
                "written",
            )


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ConfigError(
            f"the weight plan is inconsistent: {problem}",
            "correct the family's table in model/families.py",
        )


@contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disables cyclic garbage collection, which doubles the time to build a million small lists."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def summary(plan: Plan) -> str:
    gb, total = 1e9, plan.total_bytes / 1e9
    lines = [
        f"model {plan.model}: {total:.2f} GB as {plan.dtype}, {len(plan.routes)} tensors",
        f"trainer {plan.trainer} -> engine {plan.engine}",
        f"bytes to each tensor-parallel rank of each server: {total:.2f} GB (ranks keep a slice)",
        f"memory on a weight source in addition to the model: {plan.peak_bytes / gb:.2f} GB",
        f"expected seconds: {plan.seconds['wire']:.2f} to send; meanwhile the busiest source "
        f"gathers for {plan.seconds['gather']:.2f}",
    ]
    for source in plan.sources:
        content = ""
        if plan.trainer["ep"] > 1:
            content = ", everything but other ranks' experts"
            if source.expert_rank:
                content = f", experts of rank {source.expert_rank}"
        lines.append(
            f"  stage {source.stage}{content}: {source.num_bytes / gb:.2f} GB in "
            f"{source.buckets} buckets, {source.gather_bytes / gb:.2f} GB of it gathered"
        )
    return "\n".join(lines)
