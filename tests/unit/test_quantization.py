"""fp8 weights: quantizer against a formula of its own, digests, plan, memory, refused settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from config_builders import config_tree
from model_shapes import DENSE_32B, MOE_235B, TINY_FAMILIES, TINY_SIZES, plan_config

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.warnings import warnings
from megatron_async_rl.errors import ConfigError, PublishError
from megatron_async_rl.model import layout, memory, weight_plan
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.engine.block_fp8 import is_quantized
from megatron_async_rl.model.families import FAMILIES
from megatron_async_rl.model.layout import Layout
from megatron_async_rl.model.shape import ModelShape, map_parameter, parameter_names
from megatron_async_rl.protocol import rules
from megatron_async_rl.protocol.messages import Hello
from megatron_async_rl.protocol.weight_messages import PublishOffer
from megatron_async_rl.weights.bucket import plan_buckets
from megatron_async_rl.weights.digest import EngineDigests, sha256
from megatron_async_rl.weights.quantization import Quantizer, quantize_blocks, quantized_infos
from megatron_async_rl.weights.reshard import TensorInfo

FP8 = {"weights.quantization": "fp8_block"}


def fp8_values() -> np.ndarray:
    """Returns the magnitudes of float8 e4m3 by their bits 0 to 126, by the format's definition."""
    exponent, mantissa = np.divmod(np.arange(127), 8)
    return np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(float) - 10)
    )


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (bits, scales); the nearest value, and of two equally near ones the even bits."""
    values, bits = fp8_values(), np.zeros(weight.shape, np.uint8)
    scales = np.zeros((weight.shape[0] // 128, weight.shape[1] // 128), np.float32)
    for row, column in np.ndindex(scales.shape):
        place = np.s_[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
        scales[row, column] = np.abs(weight[place]).max() / np.float32(448)
        wanted = weight[place] / scales[row, column]
        above = np.searchsorted(values, np.abs(wanted)).clip(1, 126)
        below_gap = np.abs(wanted) - values[above - 1]
        gap = values[above] - np.abs(wanted)
        up = (gap < below_gap) | ((gap == below_gap) & (above % 2 == 0))
        bits[place] = np.where(up, above, above - 1) + 128 * np.signbit(wanted)
    return bits, scales


def dequantized(fp8: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return fp8.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantizer_rounds_to_the_nearest_value_of_the_block(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # magnitudes over 12 orders: also subnormal values, and blocks of very different scales
    weight = torch.randn(256, 384) * 10.0 ** torch.randint(-6, 6, (256, 384))
    weight = weight.to(dtype)
    fp8, scales = quantize_blocks(weight)
    bits, expected = quantized(weight.float().numpy())
    assert np.array_equal(scales.numpy(), expected)
    assert np.array_equal(fp8.view(torch.uint8).numpy(), bits)
    error = (dequantized(fp8, scales) - weight.float()).abs()
    steps = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert (error <= torch.maximum(weight.float().abs() * 2**-4, steps * 2**-10) * 1.0001).all()


def test_block_of_zeros_stays_zero_and_tiny_ones_stay_finite() -> None:
    weight = torch.ones(128, 384)
    weight[:, :128] = 0
    weight[:, 128:256] = 1e-41
    fp8, scales = quantize_blocks(weight)
    assert scales.isfinite().all() and (scales > 0).all()
    assert not fp8[:, :256].float().any()
    assert torch.equal(dequantized(fp8, scales)[:, 256:], weight[:, 256:])


def test_rows_beyond_one_chunk_are_quantized_too() -> None:
    weight = torch.full((256, 513 * 128), 0.5, dtype=torch.bfloat16)  # one block row in a chunk
    weight[128:] = 3.0
    fp8, scales = quantize_blocks(weight)
    assert torch.equal(scales[:, 0], torch.tensor([0.5, 3.0]) / 448)
    assert (fp8.view(torch.uint8) == 126).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    quantizer, name = Quantizer(), "model.layers.3.mlp.up_proj.weight"
    weight = torch.ones(128, 256)
    tensors = [("model.layers.2.mlp.up_proj.weight", weight.clone()), (name, weight)]
    list(quantizer(tensors))
    quantizer.check()
    weight[100, 200] = bad
    list(quantizer(tensors))
    with pytest.raises(PublishError, match=f"{name} has a NaN or an infinity"):
        quantizer.check()


def moe_shape(**sizes: Any) -> ModelShape:
    family = next(family for family in FAMILIES if family.name == "qwen3_moe")
    sizes = {
        "num_layers": 2,
        "hidden_size": 128,
        "ffn_hidden_size": 0,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 64,
        "vocab_size": 50,
        "padded_vocab_size": 52,
        "tied": False,
        "num_experts": 4,
        "expert_ffn_hidden_size": 512,
    } | sizes
    return ModelShape(family=family, **sizes)


def sent(shape: ModelShape) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(1)
    pieces = [p for name in parameter_names(shape) for p in map_parameter(name, shape).pieces]
    tensors = [(name, torch.randn(sizes)) for name, sizes in pieces]
    infos = [TensorInfo(name, tuple(t.shape), t.dtype, name) for name, t in tensors]
    found = list(Quantizer()(tensors))
    planned = [(info.name, info.shape, info.dtype) for info in quantized_infos(infos)]
    assert planned == [(name, tuple(t.shape), t.dtype) for name, t in found]
    return found


def test_controller_takes_the_offer_of_fp8_weights() -> None:
    infos = [TensorInfo(name, tuple(t.shape), t.dtype, name) for name, t in sent(moe_shape())]
    buckets = plan_buckets(infos, 1 << 20)
    assert any(spec.dtype == "float8_e4m3fn" for bucket in buckets for spec in bucket.tensors)
    offer = PublishOffer(0, 0, 1, buckets, "gloo")
    source = Hello("trainer", "trainer-0", 1, leader=0, stage=0)
    limits = rules.Limits(version=0, steps=1, num_leaders=1, num_stages=1)
    assert rules.problem(offer, source, limits) == ""


@pytest.mark.parametrize("tp", [1, 2])
def test_plan_and_digests_agree_on_fp8_tensors(tp: int) -> None:
    shape, sizes = moe_shape(), Layout(tp=4, engine_tp=tp, quantized=True)
    layout.check(sizes, shape)
    names = parameter_names(shape)
    routes = [r for name in names for r in weight_plan.parameter_routes(name, shape, sizes)]
    weight_plan.verify(routes, shape, sizes)
    tensors, digests = dict(sent(shape)), EngineDigests(shape, tp)
    for name, tensor in sent(shape):
        digests.add(name, tensor)
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for route in routes:
        for rank, start, end in route.pieces:
            piece = tensors.pop(route.tensor) if rank == tp - 1 else tensors[route.tensor]
            held = piece.narrow(route.cut or 0, start, end - start)
            if route.tensor in ("model.embed_tokens.weight", "lm_head.weight"):
                padding = 64 // tp - len(held)
                held = torch.cat([held, held.new_zeros(padding, held.shape[1])])
            parts.setdefault(f"{rank}:{route.engine_tensor}", {})[route.part] = held
    assert not tensors
    expected = {name: sha256(*(found[n] for n in sorted(found))) for name, found in parts.items()}
    assert digests.result() == expected
    scale = f"{tp - 1}:model.layers.1.mlp.experts.w13_weight_scale_inv"
    changed = EngineDigests(shape, tp)
    for name, tensor in sent(shape):
        if name == "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv":
            tensor.view(torch.uint8)[-1, 0] ^= 1
        changed.add(name, tensor)
    different = {name for name, value in changed.result().items() if value != expected[name]}
    assert different == {scale}


@pytest.mark.parametrize("tp", [1, 2])
def test_digests_of_fp8_experts_are_the_same_over_two_owners(tp: int) -> None:
    shape = moe_shape()
    alone = EngineDigests(shape, tp, "tiles")
    owners = [EngineDigests(shape, tp, "tiles", expert_owners=2) for _ in range(2)]
    for name, tensor in sent(shape):
        alone.add(name, tensor)
        expert = int(name.split(".")[5]) if ".experts." in name else 0
        owners[expert // 2].add(name, tensor)
    first = owners[0]
    assert first.can_sum_experts(1)
    parts = zip(*(digests.expert_parts(n) for n, digests in enumerate(owners)), strict=True)
    first.set_expert_parts(*(a + b for a, b in parts))
    assert first.result() == alone.result()


def test_plan_and_memory_count_one_byte_per_quantized_weight(tmp_path: Path) -> None:
    plain = plan_config(tmp_path, DENSE_32B, tensor_model=2, engine=2)
    tree = msgspec.to_builtins(plain)
    tree["weights"]["quantization"] = "fp8_block"
    config = configuration.from_tree(tree)
    whole, fp8 = weight_plan.make(plain, 50.0), weight_plan.make(config, 50.0)
    hf = HfConfig(tmp_path)
    shape = hf.shape()
    pieces = [p for name in parameter_names(shape) for p in map_parameter(name, shape).pieces]
    linear = sum(rows[0] * rows[1] for name, rows in pieces if is_quantized(name))
    assert whole.total_bytes - fp8.total_bytes == linear - 4 * linear // 128**2
    assert fp8.sources[0].gather_bytes == whole.sources[0].gather_bytes
    assert "bfloat16 and fp8" in weight_plan.summary(fp8)
    saved = memory.server_memory(plain, hf).weights - memory.server_memory(config, hf).weights
    assert saved == pytest.approx(linear * (1 - 4 / 128**2) / 2, rel=1e-3)


def fp8_config(**changes: Any) -> Config:
    return configuration.from_tree(config_tree(**FP8, **changes))


CORRECTION = "algorithm.staleness_correction"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm.loss": {"objective": "ppo"}}, "does not weight tokens by trainer over engine"),
        ({CORRECTION: {"proximal": "loglinear"}}, "would not be corrected"),
        ({CORRECTION: {"behavior_weight_cap": None}}, "does not bound the weights"),
        ({"sglang": {"quantization": "fp8"}}, "weights.quantization=fp8_block sends fp8"),
        (
            {"sglang": {"device": "cpu"}, "weights.broadcast_unit": "tensor"},
            "which gloo does not know",
        ),
    ],
)
def test_settings_that_fp8_excludes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fp8_config(**changes)


def test_fp8_accepts_another_bound_and_has_no_effect_without_a_trainer() -> None:
    fp8_config(**{CORRECTION: {"behavior_weight_cap": None, "m2_threshold": 0.04}})
    config = fp8_config(**{"run.mode": "rollout_only", "algorithm.loss": {"objective": "ppo"}})
    assert not config.sends_fp8
    assert any("weights.quantization" in text for text in warnings(config))


@pytest.mark.parametrize(
    ("sizes", "tp", "message"),
    [
        ({"hidden_size": 192}, 1, "q_proj.weight: 512 x 192"),
        ({"expert_ffn_hidden_size": 192}, 1, "experts.0.gate_proj.weight: 192 x 128"),
        ({}, 4, r"k_proj.weight: 64 x 128 .*sglang.tp_size = 4.*or lower sglang.tp_size"),
    ],
)
def test_sizes_without_whole_blocks_are_refused(
    sizes: dict[str, int], tp: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        layout.check_engine(Layout(engine_tp=tp, quantized=True), moe_shape(**sizes))
    layout.check_engine(Layout(engine_tp=tp), moe_shape(**sizes))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
def test_models_with_other_linear_layers_are_refused(family: str, tmp_path: Path) -> None:
    plan_config(tmp_path, TINY_SIZES | TINY_FAMILIES[family])
    with pytest.raises(ConfigError, match=f"is not for {family}, whose model.layers.0"):
        layout.check_engine(Layout(quantized=True), HfConfig(tmp_path).shape())


def test_published_models_have_whole_blocks_on_eight_ranks(tmp_path: Path) -> None:
    for model, tp in ((DENSE_32B, 8), (MOE_235B, 4)):
        plan_config(tmp_path, model)
        layout.check_engine(Layout(engine_tp=tp, quantized=True), HfConfig(tmp_path).shape())
