"""The way of every weight, worked out on a laptop: trainer shard -> Hugging Face tensor -> engine shard.

Made from config.json and the two layouts alone; nothing is loaded, no process group exists. `make` refuses layouts that
cannot be, and proves the map: every element of every engine rank is written exactly once, and every element of every
Hugging Face tensor comes from exactly one trainer shard (the others that hold it are copies).
"""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.weights.digest import (
    COLUMN_CUT,
    VOCABULARY,
    VOCABULARY_MULTIPLE,
    engine_place,
)
from megatron_async_rl.weights.folder import ModelFolder
from megatron_async_rl.weights.mapping import TOP, ModelShape, place

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PRECISION = {"fp32": "float32", "bf16": "bfloat16"}


class Route(msgspec.Struct, frozen=True):
    """One Hugging Face tensor. Ranges are half-open, along the named dimension."""

    tensor: str
    shape: list[int]
    parameter: str  # Megatron's, with global layer and expert numbers
    stage: int
    expert_rank: int  # -1: not an expert
    split: int | None  # the dimension that the trainer cuts
    shards: list[list[int]]  # [tensor-parallel rank, start, end] of the Hugging Face tensor
    engine_tensor: str
    part: int
    cut: int | None  # the dimension that the engine cuts
    pieces: list[list[int]]  # [engine rank, start, end] of the Hugging Face tensor


class Source(msgspec.Struct, frozen=True):
    """A rank from which weights leave, through an update group of its own (reshard.py)."""

    stage: int
    expert_rank: int  # whose experts it sends; 0 sends everything else of the stage too
    num_bytes: int
    buckets: int
    gather_bytes: int  # what it receives from the ranks that cut its tensors with it


class Plan(msgspec.Struct, frozen=True):
    model: str
    trainer: dict[str, int]
    engine: dict[str, int]
    dtype: str
    total_bytes: int
    sources: list[Source]  # in the order in which a server takes their buckets
    peak_bytes: int  # beside the model, on a source: two buckets
    seconds: dict[str, float]
    routes: list[Route]


@dataclass(frozen=True)
class Layouts:
    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    cp: int
    dp: int
    engine_tp: int
    servers: int

    @classmethod
    def of(cls, config: Config) -> Layouts:
        size = config.parallel_size
        tp = size("tensor_model")
        return cls(
            tp, size("pipeline_model"), size("virtual_pipeline_model"), size("expert_model"),
            int(config.megatron.get("expert_tensor_parallel_size", tp)), size("context"),
            config.trainer.data_parallel_size, int(config.sglang.get("tp_size", 1)), config.rollout.servers,
        )  # fmt: skip

    def stage_of(self, layer: int, num_layers: int) -> int:
        """Interleaved pipelines deal the chunks of layers out in turns."""
        return layer // (num_layers // (self.pp * self.vpp)) % self.pp


def make(config: Config, link_gb_s: float) -> Plan:
    """Raises ConfigError for a layout that cannot be. `link_gb_s`: what one rank's link carries, in 10^9 bytes/s."""
    folder = ModelFolder(config.model.path)
    layouts = Layouts.of(config)
    padding = int(config.megatron.get("make_vocab_size_divisible_by", 1)) * layouts.tp
    shape = folder.shape(padding)
    check(layouts, shape)
    with _no_garbage():
        routes = [route for name in parameters(shape) for route in _routes(name, shape, layouts)]
        prove(routes, shape, layouts)
    dtype = (
        config.weights.dtype
        if config.weights.dtype != "as_trained"
        else _PRECISION[config.trainer.precision]
    )
    width = BYTES[dtype]
    num_bytes: Counter[tuple[int, int]] = Counter()
    gathered: Counter[tuple[int, int]] = Counter()
    largest = 0
    for route in routes:
        size, source = prod(route.shape) * width, (route.stage, max(route.expert_rank, 0))
        num_bytes[source] += size
        gathered[source] += size * (len(route.shards) - 1) // len(route.shards)
        largest = max(largest, size)
    sources = [
        Source(*source, size, -(-size // config.weights.bucket_bytes), gathered[source])
        for source, size in sorted(num_bytes.items())
    ]
    total, most = num_bytes.total(), max(num_bytes.values())
    link = link_gb_s * 1e9
    return Plan(
        model=str(config.model.path),
        trainer={k: getattr(layouts, k) for k in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")},
        engine={"tp": layouts.engine_tp, "servers": layouts.servers},
        dtype=dtype,
        total_bytes=total,
        sources=sources,
        peak_bytes=2 * max(min(config.weights.bucket_bytes, most), largest),
        # a server takes one source after the other; a source gathers while it sends
        seconds={"wire": total / link, "gather": max(gathered.values()) / link},
        routes=routes,
    )


def check(layouts: Layouts, shape: ModelShape) -> None:
    tp, etp, engine = layouts.tp, layouts.etp, layouts.engine_tp
    groups = shape.num_query_groups
    chunks = layouts.pp * layouts.vpp
    rules = [
        (
            "megatron.tensor_model_parallel_size",
            tp,
            "num_attention_heads",
            shape.num_attention_heads,
        ),
        ("megatron.tensor_model_parallel_size", tp, "num_key_value_heads", groups),
        (
            "pipeline_model_parallel_size * virtual size under megatron:",
            chunks,
            "num_hidden_layers",
            shape.num_layers,
        ),
        ("sglang.tp_size", engine, "num_attention_heads", shape.num_attention_heads),
        (
            "sglang.tp_size",
            engine,
            f"vocabulary's padding of {VOCABULARY_MULTIPLE}",
            VOCABULARY_MULTIPLE,
        ),
    ]
    if shape.num_experts:
        rules += [
            ("megatron.expert_model_parallel_size", layouts.ep, "num_experts", shape.num_experts),
            (
                "megatron.expert_tensor_parallel_size",
                etp,
                "moe_intermediate_size",
                shape.expert_ffn_hidden_size,
            ),
            ("sglang.tp_size", engine, "moe_intermediate_size", shape.expert_ffn_hidden_size),
        ]
    else:
        rules += [
            ("megatron.tensor_model_parallel_size", tp, "intermediate_size", shape.ffn_hidden_size),
            ("sglang.tp_size", engine, "intermediate_size", shape.ffn_hidden_size),
            (
                "megatron.expert_model_parallel_size",
                layouts.ep,
                "number of experts (it has none)",
                1,
            ),
        ]
    for name, size, what, count in rules:
        if count % size:
            raise ConfigError(
                f"{name} = {size} does not divide the model's {what} = {count}; use a divisor of it"
            )
    if groups % engine and engine % groups:
        raise ConfigError(
            f"sglang.tp_size = {engine} neither divides num_key_value_heads = {groups} nor is a multiple of it; use one that does"
        )
    if layouts.vpp > 1 and layouts.pp == 1:
        raise ConfigError(
            f"megatron.virtual_pipeline_model_parallel_size = {layouts.vpp} needs pipeline_model_parallel_size >= 2"
        )
    stage_ranks = layouts.tp * layouts.cp * layouts.dp
    if stage_ranks % (layouts.ep * etp):
        raise ConfigError(
            f"megatron.expert_model_parallel_size = {layouts.ep} times expert_tensor_parallel_size = {etp} does not divide "
            f"the {stage_ranks} ranks of a pipeline stage; raise trainer.data_parallel_size or lower one of them"
        )


def parameters(shape: ModelShape) -> Iterator[str]:
    """Megatron's parameters that are sent, with global numbers."""
    for rule in TOP:
        if not (shape.tied and rule.megatron == "output_layer.weight"):
            yield rule.megatron
    for layer in range(shape.num_layers):
        for rule in shape.family.layer:
            experts = range(shape.num_experts) if "{e}" in rule.megatron else (0,)
            for expert in experts:
                yield f"decoder.layers.{layer}.{rule.megatron}".replace("{e}", str(expert))


def _routes(name: str, shape: ModelShape, layouts: Layouts) -> Iterator[Route]:
    placed = place(name, shape)
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        stage = layouts.stage_of(int(parts[2]), shape.num_layers)
    else:
        stage = 0 if parts[0] == "embedding" else layouts.pp - 1
    expert = int(parts[parts.index("local_experts") + 1]) if "local_experts" in parts else -1
    ranks = layouts.tp if expert < 0 else layouts.etp
    split = placed.rule.split
    for hf, full in placed.pieces:
        there = engine_place(hf, shape)
        shards = [[0, 0, full[0]]]
        if split is not None:
            whole = shape.padded_vocab_size if there.leaf in VOCABULARY else full[split]
            step = whole // ranks
            shards = [
                [r, min(r * step, full[split]), min((r + 1) * step, full[split])]
                for r in range(ranks)
            ]
        cut, pieces = _engine_pieces(there.leaf, full, shape, layouts.engine_tp)
        expert_rank = -1 if expert < 0 else expert // (shape.num_experts // layouts.ep)
        yield Route(
            hf, list(full), name, stage, expert_rank, split, shards, there.whole, there.part, cut, pieces
        )  # fmt: skip


def _engine_pieces(
    leaf: str, full: tuple[int, ...], shape: ModelShape, tp: int
) -> tuple[int | None, list[list[int]]]:
    """Which part of the HF tensor each engine rank holds; rows of padding belong to no HF tensor."""
    cut_rows = (*VOCABULARY, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    if leaf in COLUMN_CUT and len(full) > 1:
        step = full[1] // tp
        return 1, [[r, r * step, (r + 1) * step] for r in range(tp)]
    if leaf not in cut_rows:
        return None, [[r, 0, full[0]] for r in range(tp)]
    if leaf in VOCABULARY:
        step = -(-full[0] // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // tp
        return 0, [[r, min(r * step, full[0]), min((r + 1) * step, full[0])] for r in range(tp)]
    if leaf in ("k_proj", "v_proj") and shape.num_query_groups < tp:
        copies = tp // shape.num_query_groups
        head = shape.kv_channels
        return 0, [[r, r // copies * head, (r // copies + 1) * head] for r in range(tp)]
    step = full[0] // tp
    return 0, [[r, r * step, (r + 1) * step] for r in range(tp)]


def prove(routes: list[Route], shape: ModelShape, layouts: Layouts) -> None:
    """Raises ConfigError unless the map is whole: see the head of this file."""
    seen: dict[str, set[int]] = defaultdict(set)
    elements: dict[tuple[str, int], int] = defaultdict(int)
    names: set[str] = set()
    for route in routes:
        _need(route.tensor not in names, f"{route.tensor} is sent twice")
        names.add(route.tensor)
        along = 0 if route.split is None else route.split
        ends = [0, *(end for _, _, end in route.shards)]
        whole = [start for _, start, _ in route.shards] == ends[:-1] and ends[-1] == route.shape[
            along
        ]
        _need(
            whole,
            f"the trainer's shards {route.shards} do not make up {route.tensor} {route.shape}",
        )
        _need(
            route.part not in seen[route.engine_tensor],
            f"{route.engine_tensor} gets part {route.part} twice",
        )
        seen[route.engine_tensor].add(route.part)
        others = prod(route.shape) // route.shape[route.cut or 0]
        for rank, start, end in route.pieces:
            _need(
                0 <= start <= end <= route.shape[route.cut or 0],
                f"rank {rank} reads beyond {route.tensor}",
            )
            elements[route.engine_tensor, rank] += (end - start) * others
    expected = dict(engine_sizes(shape, layouts.engine_tp))
    _need(
        seen.keys() == expected.keys(),
        f"engine tensors without a source: {sorted(expected.keys() - seen.keys())[:3]}",
    )
    for name, sizes in expected.items():
        _need(
            seen[name] == set(range(len(seen[name]))),
            f"parts of {name} are missing: it gets {sorted(seen[name])}",
        )
        for rank, size in enumerate(sizes):
            got = elements[name, rank]
            _need(
                got == size,
                f"engine rank {rank} holds {size} elements of {name}, and {got} are written",
            )


def engine_sizes(shape: ModelShape, tp: int) -> Iterator[tuple[str, list[int]]]:
    """Elements of each engine tensor on each rank, padding apart: from the engine's side, not from the map."""
    hidden, head = shape.hidden_size, shape.kv_channels
    step = -(-shape.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // tp
    rows = [max(0, min(step, shape.vocab_size - r * step)) * hidden for r in range(tp)]
    yield "model.embed_tokens.weight", rows
    if not shape.tied:
        yield "lm_head.weight", rows
    yield "model.norm.weight", [hidden] * tp
    qkv = (shape.num_attention_heads // tp + 2 * max(1, shape.num_query_groups // tp)) * head
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", [hidden] * tp
        yield f"{at}.post_attention_layernorm.weight", [hidden] * tp
        yield f"{at}.self_attn.qkv_proj.weight", [qkv * hidden] * tp
        yield (
            f"{at}.self_attn.o_proj.weight",
            [shape.num_attention_heads // tp * head * hidden] * tp,
        )
        if shape.family.qkv_bias:
            yield f"{at}.self_attn.qkv_proj.bias", [qkv] * tp
        if shape.family.qk_norm:
            yield f"{at}.self_attn.q_norm.weight", [head] * tp
            yield f"{at}.self_attn.k_norm.weight", [head] * tp
        if shape.num_experts:
            ffn = shape.num_experts * (shape.expert_ffn_hidden_size // tp) * hidden
            yield f"{at}.mlp.gate.weight", [shape.num_experts * hidden] * tp
            yield f"{at}.mlp.experts.w13_weight", [2 * ffn] * tp
            yield f"{at}.mlp.experts.w2_weight", [ffn] * tp
        else:
            ffn = shape.ffn_hidden_size // tp * hidden
            yield f"{at}.mlp.gate_up_proj.weight", [2 * ffn] * tp
            yield f"{at}.mlp.down_proj.weight", [ffn] * tp


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Of a million small lists that all stay, the collector would look through all again and again: twice the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _need(true: bool, otherwise: str) -> None:
    if not true:
        raise ConfigError(
            f"the plan does not hold: {otherwise}; the family's table in weights/mapping.py is wrong"
        )


def summary(plan: Plan) -> str:
    gb = 1e9
    lines = [
        f"model {plan.model}: {plan.total_bytes / gb:.2f} GB as {plan.dtype}, {len(plan.routes)} tensors",
        f"trainer {plan.trainer} -> engine {plan.engine}",
        f"bytes to each server: {plan.total_bytes / gb:.2f} GB to each of its tensor-parallel ranks (they cut for themselves)",
        f"memory beside the model on a source: {plan.peak_bytes / gb:.2f} GB",
        f"expected on the wire: {plan.seconds['wire']:.2f} s; meanwhile gathered by the busiest source: {plan.seconds['gather']:.2f} s",
    ]
    for source in plan.sources:
        whose = (
            f"experts of rank {source.expert_rank}"
            if source.expert_rank
            else "all but other ranks' experts"
        )
        whose = f", {whose}" if plan.trainer["ep"] > 1 else ""
        lines.append(
            f"  stage {source.stage}{whose}: {source.num_bytes / gb:.2f} GB in {source.buckets} buckets, "
            f"{source.gather_bytes / gb:.2f} GB of it gathered"
        )
    return "\n".join(lines)
