"""The ranges of a weight plan, applied to real tensors, against Megatron's shards and digests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_shapes import DENSE_32B, MOE_235B, TINY_LINEAR, plan_config, tiny_latent

from megatron_async_rl.__main__ import main
from megatron_async_rl.config import load as configuration
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model import layout, weight_plan
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.families import FAMILIES
from megatron_async_rl.model.layout import Layout
from megatron_async_rl.model.shape import ModelShape, parameter_names
from megatron_async_rl.weights.digest import EngineDigests, engine_slice, sha256
from megatron_async_rl.weights.mapping import from_hf


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelShape, Layout]:
    family = draw(st.sampled_from(FAMILIES))
    tp = draw(st.sampled_from([1, 2, 4]))
    pp, vpp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    engine, groups = draw(st.sampled_from([1, 2, 4, 8])), tp * draw(st.sampled_from([1, 2]))
    vocab = draw(st.integers(33, 200))
    shape = ModelShape(
        family=family,
        num_layers=4,
        hidden_size=16,
        ffn_hidden_size=48,
        num_attention_heads=16,
        num_query_groups=groups,
        kv_channels=6 if family.latent_attention else 2,
        vocab_size=vocab,
        padded_vocab_size=-(-vocab // tp) * tp,
        tied=draw(st.booleans()),
        num_experts=4 if family.experts else 0,
        expert_ffn_hidden_size=16,
        shared_ffn_hidden_size=32 if family.dense_layer or family.linear_layer else 0,
        num_dense_layers=draw(st.integers(0, 2)) if family.dense_layer else 0,
        latent=tiny_latent(family),
        linear=replace(TINY_LINEAR, num_key_heads=8, num_value_heads=16)
        if family.linear_layer
        else None,
    )
    ep, etp = (
        (draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2])))
        if family.experts
        else (1, tp)
    )
    vpp = vpp if pp > 1 else 1
    return shape, Layout(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, dp=ep * etp, engine_tp=engine)


def reference_slice(
    leaf: str, tensor: torch.Tensor, shape: ModelShape, rank: int, tp: int
) -> torch.Tensor:
    """Computes a rank's slice in a second way, with `chunk` instead of ranges."""
    if leaf in ("embed_tokens", "lm_head"):
        padding = -len(tensor) % 64
        tensor = torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
    elif leaf in ("o_proj", "down_proj", "out_proj"):
        return tensor.chunk(tp, 1)[rank]
    elif leaf in ("k_proj", "v_proj") and shape.num_query_groups < tp:
        return tensor.chunk(shape.num_query_groups)[rank // (tp // shape.num_query_groups)]
    elif leaf == "conv1d":
        parts = tensor.split(shape.linear.conv_sections)
        return torch.cat([part.chunk(tp)[rank] for part in parts])
    elif (
        leaf
        not in (
            "q_proj k_proj v_proj gate_proj up_proj q_b_proj kv_b_proj in_proj_qkvz in_proj_ba "
            "linear_attn"
        ).split()
    ):
        return tensor
    return tensor.chunk(tp)[rank]


@settings(max_examples=60, deadline=None)
@given(cases())
def test_plan_ranges_match_shards_and_engine_tensors(
    case: tuple[ModelShape, Layout],
) -> None:
    shape, layouts = case
    layout.check(layouts, shape)
    routes = [
        route
        for name in parameter_names(shape)
        for route in weight_plan.parameter_routes(name, shape, layouts)
    ]
    weight_plan.verify(routes, shape, layouts)
    generator = torch.Generator().manual_seed(0)
    tensors = {route.tensor: torch.randn(route.shape, generator=generator) for route in routes}
    engine: dict[str, dict[int, torch.Tensor]] = {}
    digests = EngineDigests(shape, layouts.engine_tp)
    for route in routes:
        tensor = tensors[route.tensor]
        digests.add(route.tensor, tensor)
        leaf = route.tensor.split(".")[-2]
        for rank in range(layouts.engine_tp):
            piece = torch.cat(
                [
                    tensor.narrow(route.cut or 0, start, end - start)
                    for holder, start, end in route.pieces
                    if holder == rank
                ],
                route.cut or 0,
            )
            whole = reference_slice(leaf, tensor, shape, rank, layouts.engine_tp)
            assert torch.equal(engine_slice(leaf, tensor, shape, rank, layouts.engine_tp), whole)
            # the rest is padding
            assert torch.equal(whole[: len(piece)], piece) and not whole[len(piece) :].any()
            engine.setdefault(f"{rank}:{route.engine_tensor}", {})[route.part] = whole
    expected = {name: sha256(*(parts[n] for n in sorted(parts))) for name, parts in engine.items()}
    assert digests.result() == expected
    for name in parameter_names(shape):
        own = {route.tensor: route for route in routes if route.parameter == name}
        ranks = layouts.etp if "local_experts" in name else layouts.tp
        for rank in range(ranks):
            read: dict[str, list[list[int]]] = {}

            def read_slice(
                hf: str,
                index: tuple[slice, ...],
                own: dict[str, weight_plan.Route] = own,
                read: dict[str, list[list[int]]] = read,
            ) -> torch.Tensor:
                along = own[hf].split or 0
                start, end, _ = index[along].indices(tensors[hf].shape[along])
                read.setdefault(hf, []).append([start, end])
                return tensors[hf][index]

            from_hf(name, read_slice, shape, rank, ranks)
            for hf, route in own.items():
                holder = rank if route.split is not None else 0
                assert read[hf] == [shard[1:] for shard in route.shards if shard[0] == holder], hf


def test_plan_with_a_gap_or_overlap_is_rejected(tmp_path: Path) -> None:
    config = plan_config(tmp_path, DENSE_32B, tensor_model=2, engine=2)
    whole = weight_plan.make(config, 50.0)
    shape, layouts = HfConfig(tmp_path).shape(2), Layout.from_config(config)
    weight_plan.verify(whole.routes, shape, layouts)
    for broken in (
        whole.routes[1:],
        [*whole.routes, whole.routes[0]],
        [*whole.routes[:3], *whole.routes[4:]],
    ):
        with pytest.raises(ConfigError, match="the weight plan is inconsistent"):
            weight_plan.verify(broken, shape, layouts)


@pytest.mark.parametrize(
    "model, sizes, reason",
    [
        (DENSE_32B, {"tensor_model": 16}, "num_key_value_heads = 8"),
        (DENSE_32B, {"engine": 3}, "sglang.tp_size = 3"),
        (DENSE_32B, {"pipeline_model": 2, "virtual_pipeline_model": 33}, "num_hidden_layers = 64"),
        (DENSE_32B, {"virtual_pipeline_model": 2}, "pipeline_model_parallel_size >= 2"),
        (DENSE_32B, {"expert_model": 2}, "has no experts"),
        (MOE_235B, {"expert_model": 3}, "num_experts = 128"),
        (MOE_235B, {"expert_model": 8, "tensor_model": 4}, "data_parallel_size"),
    ],
)
def test_impossible_layout_is_rejected_with_the_reason(
    tmp_path: Path, model: dict[str, Any], sizes: dict[str, int], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        weight_plan.make(plan_config(tmp_path, model, **sizes), 50.0)


def test_total_sizes_match_the_32b_and_235b_models(tmp_path: Path) -> None:
    dense = weight_plan.make(
        plan_config(tmp_path, DENSE_32B, tensor_model=8, pipeline_model=4, engine=4), 50.0
    )
    assert dense.total_bytes == 2 * 32_762_123_264  # parameters of Qwen3-32B
    assert (
        sum(source.num_bytes for source in dense.sources) == dense.total_bytes
        and len(dense.sources) == 4
    )
    gathered = sum(source.gather_bytes for source in dense.sources)
    assert 0.87 < gathered / dense.total_bytes < 7 / 8  # all but the norms is split in eight
    sizes = {"tensor_model": 4, "pipeline_model": 2, "expert_model": 8, "expert_tensor": 1}
    moe = weight_plan.make(
        plan_config(tmp_path, MOE_235B, data_parallel=8, engine=8, **sizes), 50.0
    )
    assert moe.total_bytes == 2 * 235_093_634_560  # of Qwen3-235B-A22B
    assert len(moe.routes) == 94 * (128 * 3 + 9) + 3
    assert [(source.stage, source.expert_rank) for source in moe.sources] == [
        (s, e) for s in range(2) for e in range(8)
    ]
    experts = 94 // 2 * 128 // 8 * 3 * 4096 * 1536 * 2  # bytes that one rank owns of one stage
    assert {source.num_bytes for source in moe.sources if source.expert_rank} == {experts}
    # no rank splits them
    assert {source.gather_bytes for source in moe.sources if source.expert_rank} == {0}


@pytest.mark.parametrize(
    "precision, dtype, num_bytes",
    [("fp32", "float32", 4), ("bf16", "bfloat16", 2), ("fp16", "float16", 2)],
)
def test_weights_are_sent_in_the_trainer_precision(
    tmp_path: Path, precision: str, dtype: str, num_bytes: int
) -> None:
    tree = msgspec.to_builtins(plan_config(tmp_path, DENSE_32B))
    tree["trainer"]["precision"] = precision
    plan = weight_plan.make(configuration.from_tree(tree), 50.0)
    assert plan.dtype == dtype and plan.total_bytes == num_bytes * 32_762_123_264


def test_command_prints_every_route(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = plan_config(tmp_path, DENSE_32B, tensor_model=8, engine=4)
    yaml, out = tmp_path / "run.yaml", tmp_path / "plan.json"
    yaml.write_text(configuration.dump(config))
    assert main(["plan-weights", str(yaml), "--json", str(out)]) == 0
    assert "65.52 GB" in capsys.readouterr().out
    routes = json.loads(out.read_text())["routes"]
    assert (
        len(routes) == 707
        and routes[0]["tensor"] == "model.embed_tokens.weight"
        and len(routes[0]["pieces"]) == 4
    )
