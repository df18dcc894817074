"""Qwen3-Next: the map of its tensors at its real size and as transformers writes a tiny one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_shapes import plan_config, tiny_shape
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.model import memory, weight_plan
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.engine import engine_types
from megatron_async_rl.model.families import FAMILIES
from megatron_async_rl.model.flops import ModelFlops
from megatron_async_rl.model.shape import map_parameter
from megatron_async_rl.model.small_model import small_model
from megatron_async_rl.trainer.comparison.recorder import query_key_value
from megatron_async_rl.trainer.model.gated_delta_net import convolve, gated_delta_rule
from megatron_async_rl.weights.mapping import from_hf

# from its config.json on huggingface.co
NEXT_80B: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


def test_plan_of_the_real_size_writes_every_element(tmp_path: Path) -> None:
    """80B parameters; weight_plan.make raises if one is missing or written twice."""
    model = NEXT_80B | {"num_experts": 64}  # 512 would take seconds
    sizes = {"tensor_model": 2, "expert_model": 8, "expert_tensor": 1}
    plan = weight_plan.make(plan_config(tmp_path, model, data_parallel=4, engine=8, **sizes), 50.0)
    experts = 48 * 3 * 2048 * 512
    parameters = plan.total_bytes // 2 + (512 - 64) * experts
    parameters += 48 * (512 - 64) * 2048  # rows of the routers
    assert 79e9 < parameters < 81e9
    # 36 layers with 8 tensors of linear attention, 12 with 7 of full attention, all with 6 more
    # and those of their experts; 3 outside
    assert len(plan.routes) == 3 + 36 * 8 + 12 * 7 + 48 * (6 + 3 * 64)


def test_sizes_of_the_real_model(tmp_path: Path) -> None:
    """About 3B of the parameters compute a token; only 12 layers keep keys and values."""
    config = plan_config(tmp_path, NEXT_80B)
    hf = HfConfig(tmp_path)
    assert 3e9 < ModelFlops.of(hf.shape(), 10).weights < 4e9
    assert memory.server_memory(config, hf).kv_per_token == 12 * 2 * 2 * 256 * 2
    assert 79e9 < memory.server_memory(config, hf).weights / 2 < 81e9


def test_map_has_the_tensors_that_transformers_writes(tmp_path: Path) -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    tiny = NEXT_80B | {
        "hidden_size": 32,
        "head_dim": 8,
        "linear_key_head_dim": 6,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 24,
        "vocab_size": 51,
    }
    arguments = {key: value for key, value in tiny.items() if key not in ("architectures", "dtype")}
    Qwen3NextForCausalLM(Qwen3NextConfig(**arguments)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    routes = weight_plan.make(plan_config(tmp_path, tiny), 50.0).routes
    assert {route.tensor: tuple(route.shape) for route in routes} == written


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"attn_output_gate": False}, "attn_output_gate"),
        ({"mlp_only_layers": [3]}, "mlp_only_layers"),
        ({"layer_types": ["full_attention"] * 48}, "layer_types"),
        ({"full_attention_interval": None}, "full_attention_interval"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads"),
        ({"rope_parameters": {"rope_theta": 5e6}}, "rope_theta = 5000000.0 in rope_parameters"),
        ({"full_attention_interval": 0}, "full_attention_interval = 0, expected .* at least 1"),
        ({"linear_num_key_heads": 0}, "linear_num_key_heads = 0, expected .* at least 1"),
    ],
)
def test_model_that_trainer_and_engine_would_compute_differently_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    plan_config(tmp_path, NEXT_80B | change)
    with pytest.raises(DataError, match=reason):
        HfConfig(tmp_path).architecture(), HfConfig(tmp_path).shape()


def test_router_normalizes_as_the_engine_does_by_default(tmp_path: Path) -> None:
    del (model := dict(NEXT_80B))["norm_topk_prob"]
    plan_config(tmp_path, model)
    assert HfConfig(tmp_path).architecture().router_normalizes
    plan_config(tmp_path, model | {"norm_topk_prob": False})
    assert not HfConfig(tmp_path).architecture().router_normalizes


def test_small_model_of_selftest_has_both_kinds_of_layers(tmp_path: Path) -> None:
    types = ["full_attention" if n % 4 == 3 else "linear_attention" for n in range(48)]
    small = small_model(plan_config(tmp_path, NEXT_80B | {"layer_types": types}))
    plan_config(tmp_path, small)
    shape = HfConfig(tmp_path).shape()
    assert [shape.is_linear(layer) for layer in range(shape.num_layers)] == [True, False]


def test_tensor_parallelism_must_divide_the_key_heads(tmp_path: Path) -> None:
    config = plan_config(tmp_path, NEXT_80B | {"linear_num_key_heads": 1}, tensor_model=2)
    with pytest.raises(ConfigError, match="linear_num_key_heads = 1"):
        weight_plan.make(config, 50.0)


def test_engine_must_compute_in_the_type_of_the_model(tmp_path: Path) -> None:
    config = plan_config(tmp_path, NEXT_80B)
    assert engine_types.convolution_dtype(config) == "bfloat16"
    config = plan_config(tmp_path, NEXT_80B | {"dtype": "float32"})  # auto is float16 then
    with pytest.raises(ConfigError, match=r"dtype = auto.*dtype float32.*linear attention"):
        engine_types.convolution_dtype(config)
    config = plan_config(tmp_path, NEXT_80B | {"dtype": None})
    with pytest.raises(ConfigError, match=r"dtype None.*write the dtype of the weights into"):
        engine_types.convolution_dtype(config)


def test_recorded_columns_of_gated_attention_have_the_order_of_the_model() -> None:
    shape = tiny_shape(next(family for family in FAMILIES if family.name == "qwen3_next"))
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    pieces = dict(map_parameter(name, shape).pieces)
    hf = {piece: torch.randn(size) for piece, size in pieces.items()}
    weight = from_hf(name, lambda piece, index: hf[piece][index], shape)
    recorded = query_key_value(weight.t(), shape.num_query_groups, shape.kv_channels, gated=True)
    assert torch.equal(recorded.t(), torch.cat(list(hf.values())))


@pytest.mark.parametrize("length", [1, 3, 100])
def test_chunked_rule_equals_its_recurrence(length: int) -> None:
    """Over one token, part of a chunk, and chunks of which the last is not full."""
    g = torch.Generator().manual_seed(length)
    query, key = (torch.randn(2, length, 2, 5, generator=g, dtype=torch.float64) for _ in "qk")
    value = torch.randn(2, length, 6, 4, generator=g, dtype=torch.float64)
    decay = -torch.rand(2, length, 6, generator=g, dtype=torch.float64)
    beta = torch.rand(2, length, 6, generator=g, dtype=torch.float64)
    got = gated_delta_rule(query, key, value, decay, beta)
    q, k = (
        (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)).repeat_interleave(3, 2)
        for x in (query, key)
    )
    state = torch.zeros(2, 6, 4, 5, dtype=torch.float64)  # [N, J, V, K]
    for t in range(length):
        state = state * decay[:, t, :, None, None].exp()
        known = torch.einsum("njvk,njk->njv", state, k[:, t])
        written = beta[:, t, :, None] * (value[:, t] - known)
        state = state + torch.einsum("njv,njk->njvk", written, k[:, t])
        want = torch.einsum("njvk,njk->njv", state, q[:, t]) / 5**0.5
        torch.testing.assert_close(got[:, t], want, rtol=1e-9, atol=1e-9)


class _Elements(TorchDispatchMode):
    """Counts the elements of all tensors that operations return, views included."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.count += sum(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


def test_work_of_backward_is_linear_in_the_length_of_a_sequence() -> None:
    counts = []
    for length in (512, 2048):
        inputs = [torch.rand(1, length, 1, 2, requires_grad=True) for _ in range(3)]
        gates = [torch.rand(1, length, 1) for _ in range(2)]
        with _Elements() as elements:
            gated_delta_rule(*inputs, -gates[0], gates[1]).sum().backward()
        counts.append(elements.count)
    assert counts[1] < 4.4 * counts[0]


def test_convolution_in_bf16_is_rounded_once() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 30, 40, generator=g).bfloat16()
    weight = torch.randn(40, 4, generator=g).bfloat16()
    exact = convolve(x.double(), weight.double())
    padded = torch.cat([torch.zeros(2, 3, 40), x], 1).double()
    mixed = sum(padded[:, i : i + 30] * weight[:, i].double() for i in range(4))
    torch.testing.assert_close(exact, torch.nn.functional.silu(mixed))
    rounded = convolve(x, weight)
    assert rounded.dtype == torch.bfloat16
    assert (rounded == exact.bfloat16()).float().mean() > 0.99
