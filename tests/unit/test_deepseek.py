"""DeepSeek-V3: the map of its tensors at its real size and as transformers writes a tiny one, the
rules for its config.json, and the angles of its rotary embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_shapes import plan_config
from safetensors import safe_open

from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.model import memory, weight_plan
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.shape import map_parameter, parameter_names
from megatron_async_rl.model.small_model import small_model
from megatron_async_rl.weights.bucket import plan_buckets
from megatron_async_rl.weights.reshard import TensorInfo

# from its config.json on huggingface.co, without quantization_config
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
QUERY_DOWN, KEY_DOWN = (
    f"decoder.layers.5.self_attention.linear_{name}_down_proj.weight" for name in ("q", "kv")
)


def test_plan_of_the_real_size_writes_every_element(tmp_path: Path) -> None:
    """671B parameters; weight_plan.make raises if one is missing or written twice."""
    sizes = {"tensor_model": 8, "expert_model": 16, "expert_tensor": 1}
    plan = weight_plan.make(plan_config(tmp_path, V3, data_parallel=2, engine=16, **sizes), 50.0)
    parameters = plan.total_bytes / {"float32": 4, "bfloat16": 2}[plan.dtype]
    assert 670e9 < parameters < 672e9
    # 9 tensors of attention and norms in a layer; an MLP has 3 more, experts 2 + 3 + 3 * 256
    assert len(plan.routes) == 3 + 61 * 9 + 3 * 3 + 58 * (2 + 3 + 3 * 256)


def test_estimates_of_the_real_size(tmp_path: Path) -> None:
    sizes = {"tensor_model": 8, "expert_model": 16, "expert_tensor": 1}
    config = plan_config(tmp_path, V3, data_parallel=32, engine=16, **sizes)
    server = memory.server_memory(config, HfConfig(tmp_path))
    # every rank of the server caches the whole latent vector of a token, in bfloat16
    assert server.kv_per_token == 61 * (512 + 64) * 2
    dense, _ = memory.layer_parameters(HfConfig(tmp_path).shape())
    attention, shared, router = 187_105_280, 3 * 7168 * 2048, 7168 * 256
    assert dense == attention + shared + router
    # queries, keys, padded values, padded output; the output itself; latents
    attention = 4 * 128 * 192 + 128 * 128 + 1536 + 576
    experts = 8 * (7168 + 2 * 2048)
    per_layer = 2 * 7168 / 8 + attention / 8 + experts + 2 * 2048 / 8
    element_bytes = {"fp32": 4, "bf16": 2}[config.trainer.precision]
    activations = memory.trainer_memory(config, HfConfig(tmp_path)).activations
    tokens = config.trainer.max_tokens_per_microbatch
    assert activations == element_bytes * tokens * 61 * per_layer


@pytest.mark.parametrize("q_lora_rank", [12, None])
def test_map_has_the_tensors_that_transformers_writes(
    tmp_path: Path, q_lora_rank: int | None
) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    tiny = V3 | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "kv_lora_rank": 10,
        "moe_intermediate_size": 16,
        "n_group": 4,
        "n_routed_experts": 8,
        "num_attention_heads": 4,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": q_lora_rank,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "topk_group": 2,
        "v_head_dim": 6,
        "vocab_size": 51,
        "num_nextn_predict_layers": 0,
    }
    del tiny["architectures"]
    DeepseekV3ForCausalLM(DeepseekV3Config(**tiny)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    model = HfConfig(tmp_path)
    architecture = model.architecture()
    assert (architecture.router_groups, architecture.router_group_top_k) == (4, 2)
    assert architecture.yarn is not None and architecture.yarn["factor"] == 40.0
    routes = weight_plan.make(plan_config(tmp_path, model.raw, engine=2), 50.0).routes
    assert {route.tensor: tuple(route.shape) for route in routes} == written


def test_projections_to_latent_vectors_share_a_bucket(tmp_path: Path) -> None:
    """The engine forgets one of the two that comes without the other."""
    plan_config(tmp_path, V3)
    shape = HfConfig(tmp_path).shape()
    assert map_parameter(KEY_DOWN, shape).bucket == QUERY_DOWN
    infos = []
    for name in (QUERY_DOWN, KEY_DOWN):
        mapping = map_parameter(name, shape)
        [(hf, size)] = mapping.pieces
        infos.append(TensorInfo(hf, size, torch.bfloat16, mapping.bucket))
    [bucket] = plan_buckets(infos, bucket_bytes=1000)  # smaller than either of them
    assert [spec.name.split(".")[-2] for spec in bucket.tensors] == [
        "q_a_proj",
        "kv_a_proj_with_mqa",
    ]
    plan_config(tmp_path, V3 | {"q_lora_rank": None})
    shape = HfConfig(tmp_path).shape()
    assert map_parameter(KEY_DOWN, shape).bucket == KEY_DOWN
    assert QUERY_DOWN not in set(parameter_names(shape))


@pytest.mark.parametrize(
    "key, value",
    [
        ("topk_method", "greedy"),
        ("topk_method", None),
        ("scoring_func", "softmax"),
        ("norm_topk_prob", False),
        ("moe_layer_freq", 2),
        ("moe_layer_freq", None),
        ("rope_interleave", False),
        ("attention_bias", True),
        ("topk_group", 2),  # Megatron would score a group by its best four experts
        ("n_group", None),
        ("topk_group", 0),
        ("routed_scaling_factor", None),  # transformers' default is 2.5
        ("rms_norm_eps", "small"),
        ("rope_scaling", ["yarn"]),
        ("num_experts_per_tok", "8"),
        ("rope_scaling", V3["rope_scaling"] | {"type": "longrope"}),
        ("rope_scaling", V3["rope_scaling"] | {"attention_factor": 2.0}),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_scaling", V3["rope_scaling"] | {"original_max_position_embeddings": 0.5}),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_model_that_megatron_would_compute_differently_is_refused(
    tmp_path: Path, key: str, value: object
) -> None:
    plan_config(tmp_path, V3 | {key: value})
    named = "|".join((key, "longrope", "attention_factor", "original_max_position_embeddings"))
    with pytest.raises(DataError, match=named):
        HfConfig(tmp_path).architecture()


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"n_group": 7}, r"n_group = 7, which does not divide its 256 experts"),
        ({"n_group": 2}, r"topk_group = 4, more than n_group = 2"),
        ({"n_group": 1}, r"topk_group = 4, more than n_group = 1"),
        ({"n_group": 256}, r"topk_group = 4 groups of 1 experts \(n_group = 256\) have 4"),
        ({"n_group": 256, "topk_group": 8}, r"n_group = 256 for 256 .* by its best 2"),
        ({"num_experts_per_tok": 300}, r"num_experts_per_tok = 300, but 256 experts"),
    ],
)
def test_groups_without_enough_experts_are_refused(
    tmp_path: Path, values: dict[str, int], problem: str
) -> None:
    plan_config(tmp_path, V3 | values)
    with pytest.raises(DataError, match=problem):
        HfConfig(tmp_path).architecture()


@pytest.mark.parametrize("name", ["factor", "original_max_position_embeddings", "beta_fast"])
def test_numbers_of_yarn_are_read_where_the_engine_reads_them(tmp_path: Path, name: str) -> None:
    """At the top level the engine does not see them."""
    rope = {key: value for key, value in V3["rope_scaling"].items() if key != name}
    plan_config(tmp_path, V3 | {"rope_scaling": rope, name: 7})
    if name == "beta_fast":  # has a default
        assert HfConfig(tmp_path).architecture().yarn["beta_fast"] == 32.0  # type: ignore[index]
        return
    with pytest.raises(DataError, match=f"{name} = None in its rope_parameters or rope_scaling"):
        HfConfig(tmp_path).architecture()


def test_fields_of_published_variants_are_accepted(tmp_path: Path) -> None:
    """Moonlight-16B-A3B and Kimi-K2: one group of experts, other YaRN, other scales."""
    moonlight = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6}
    moonlight |= {"rope_scaling": None, "n_shared_experts": 2, "routed_scaling_factor": 2.446}
    plan_config(tmp_path, V3 | moonlight)
    found = HfConfig(tmp_path).architecture()
    assert (found.yarn, found.router_groups, found.router_scale) == (None, 0, 2.446)
    assert HfConfig(tmp_path).shape().shared_ffn_hidden_size == 2 * 2048
    yarn = V3["rope_scaling"] | {"beta_fast": 1.0, "factor": 32.0}
    kimi = {"n_group": 1, "topk_group": 1, "n_routed_experts": 384, "model_type": "kimi_k2"}
    plan_config(tmp_path, V3 | kimi | {"rope_scaling": yarn})
    found = HfConfig(tmp_path).architecture()
    assert found.yarn is not None and found.yarn["beta_fast"] == 1.0


def test_other_numbers_of_heads_of_keys_are_refused(tmp_path: Path) -> None:
    plan_config(tmp_path, V3 | {"num_key_value_heads": 8})
    with pytest.raises(DataError, match=r"num_key_value_heads = 8.*num_attention_heads = 128"):
        HfConfig(tmp_path).shape()


def test_fp8_rollout_is_refused(tmp_path: Path) -> None:
    from megatron_async_rl.model.engine import block_fp8

    plan_config(tmp_path, V3)
    with pytest.raises(ConfigError, match=r"deepseek_v3.*no projection of plain attention"):
        block_fp8.check_engine(HfConfig(tmp_path).shape(), 8)


@pytest.mark.parametrize("q_lora_rank", [1536, None])
def test_small_model_of_selftest_has_experts_and_latent_attention(
    tmp_path: Path, q_lora_rank: int | None
) -> None:
    small = small_model(plan_config(tmp_path, V3 | {"q_lora_rank": q_lora_rank}))
    plan_config(tmp_path, small)
    shape = HfConfig(tmp_path).shape()
    assert 0 < shape.num_dense_layers < shape.num_layers and shape.num_experts == 256
    assert shape.latent is not None and shape.latent.kv_lora_rank == 24
    assert bool(shape.latent.q_lora_rank) == (q_lora_rank is not None)
