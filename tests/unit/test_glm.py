"""GLM-4.5-Air: the map of its tensors at its real size and as transformers writes a tiny one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_shapes import plan_config
from safetensors import safe_open

from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.model import weight_plan
from megatron_async_rl.model.config_json import HfConfig

# from its config.json on huggingface.co
AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}


def test_plan_of_the_real_size_writes_every_element(tmp_path: Path) -> None:
    """106B parameters; weight_plan.make raises if one is missing or written twice."""
    sizes = {"tensor_model": 4, "expert_model": 8, "expert_tensor": 1}
    plan = weight_plan.make(plan_config(tmp_path, AIR, data_parallel=2, engine=8, **sizes), 50.0)
    parameters = plan.total_bytes / {"float32": 4, "bfloat16": 2}[plan.dtype]
    assert 105e9 < parameters < 108e9
    # a dense layer of 9 + 3 tensors, and 45 of 9 + 3 + 2 and those of 128 experts; 3 outside
    assert len(plan.routes) == 3 + 12 + 45 * (9 + 2 + 3 + 3 * 128)


def test_map_has_the_tensors_that_transformers_writes(tmp_path: Path) -> None:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    tiny = AIR | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 51,
        "num_nextn_predict_layers": 0,
    }
    del tiny["architectures"], tiny["rope_scaling"]
    Glm4MoeForCausalLM(Glm4MoeConfig(**tiny)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    model = HfConfig(tmp_path)
    assert model.architecture().rotary_percent == 0.5
    routes = weight_plan.make(plan_config(tmp_path, model.raw), 50.0).routes
    assert {route.tensor: tuple(route.shape) for route in routes} == written


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_group", 8),
        ("use_qk_norm", True),
        ("norm_topk_prob", False),
        ("attention_bias", False),
        ("attention_bias", None),
    ],
)
def test_model_that_megatron_would_compute_differently_is_refused(
    tmp_path: Path, key: str, value: object
) -> None:
    plan_config(tmp_path, AIR | {key: value})
    with pytest.raises(DataError, match=key):
        HfConfig(tmp_path).architecture()


def test_model_without_shared_experts_is_refused(tmp_path: Path) -> None:
    plan_config(tmp_path, AIR | {"n_shared_experts": 0})
    with pytest.raises(DataError, match=r"n_shared_experts = 0.*use another model"):
        HfConfig(tmp_path).shape()


def test_scaling_factor_of_null_is_none(tmp_path: Path) -> None:
    plan_config(tmp_path, AIR | {"routed_scaling_factor": None})
    assert HfConfig(tmp_path).architecture().router_scale == 1.0


def test_missing_share_of_rope_is_that_of_engine_and_transformers(tmp_path: Path) -> None:
    plan_config(tmp_path, {key: value for key, value in AIR.items() if "rotary" not in key})
    assert HfConfig(tmp_path).architecture().rotary_percent == 0.5


def test_tensor_parallelism_must_divide_the_first_mlp_and_the_shared_experts(
    tmp_path: Path,
) -> None:
    config = plan_config(tmp_path, AIR | {"n_shared_experts": 1, "moe_intermediate_size": 1404})
    weight_plan.make(config, 50.0)
    wrong = plan_config(
        tmp_path,
        AIR | {"moe_intermediate_size": 1404},
        tensor_model=8,
        expert_model=8,
        expert_tensor=1,
    )
    with pytest.raises(ConfigError, match=r"n_shared_experts \* moe_intermediate_size = 1404"):
        weight_plan.make(wrong, 50.0)
