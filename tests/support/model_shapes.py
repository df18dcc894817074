"""Model sizes for tests: published ones as numbers, tiny ones as folders with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.families import Family
from megatron_async_rl.model.shape import (
    LatentShape,
    LinearShape,
    ModelShape,
    map_parameter,
    parameter_names,
)

DENSE_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
MOE_235B = DENSE_32B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "moe_intermediate_size": 1536,
}


def plan_config(
    folder: Path, model: dict[str, Any], data_parallel: int = 1, **sizes: int
) -> Config:
    (folder / "config.json").write_text(json.dumps(model))
    engine = sizes.pop("engine", 1)
    return configuration.from_tree(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": str(folder), "context_tokens": 64},
            "data": {"train": "unused"},
            "rollout": {"max_new_tokens": 32},
            "algorithm": {"prompts_per_step": 64, "samples_per_prompt": 2},
            "trainer": {"data_parallel_size": data_parallel},
            "megatron": {f"{name}_parallel_size": size for name, size in sizes.items()},
            "sglang": {"tp_size": engine},
        }
    )


def tiny_latent(family: Family) -> LatentShape | None:
    """Returns the sizes of latent attention whose queries have heads of 6 elements."""
    sizes = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 5, "kv_lora_rank": 7}
    queries = 10 if family.latent_queries else 0
    return LatentShape(q_lora_rank=queries, **sizes) if family.latent_attention else None


TINY_LINEAR = LinearShape(
    full_attention_interval=2,
    num_key_heads=4,
    num_value_heads=8,
    key_head_dim=3,
    value_head_dim=5,
    conv_width=3,
)


def tiny_shape(family: Family, tied: bool = False, padded: int = 52) -> ModelShape:
    return ModelShape(
        family=family,
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=6,
        vocab_size=50,
        padded_vocab_size=padded,
        tied=tied,
        num_experts=4 if family.experts else 0,
        expert_ffn_hidden_size=12,
        shared_ffn_hidden_size=8 if family.dense_layer or family.linear_layer else 0,
        num_dense_layers=1 if family.dense_layer else 0,
        latent=tiny_latent(family),
        linear=TINY_LINEAR if family.linear_layer else None,
    )


NUM_RANKS = 4  # trainer ranks of a test of weight updates
UPDATE_TIMEOUT_S = 60.0
TINY_SIZES: dict[str, Any] = {
    "vocab_size": 51,  # odd: padded under TP
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "qwen3 two groups": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}
TINY_FAMILIES["glm4_moe"] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 1.5,
    "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 0,
    "num_key_value_heads": 2,
    "num_hidden_layers": 5,  # odd: stages of a pipeline differ
}
TINY_FAMILIES["deepseek_v3"] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,  # as transformers writes it: the elements that RoPE rotates
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
}
TINY_FAMILIES["deepseek_v3 full queries"] = TINY_FAMILIES["deepseek_v3"] | {
    "q_lora_rank": None,
    "rope_scaling": None,
}
TINY_FAMILIES["qwen3_next"] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "full_attention_interval": 2,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
}
# For an engine of two ranks on a CPU, which pads experts that its blocks do not divide.
TINY_FAMILIES["qwen3_next of blocks"] = TINY_FAMILIES["qwen3_next"] | {
    "vocab_size": 37,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "dtype": "float32",
}
TINY_FAMILIES["deepseek_v3 of blocks"] = TINY_FAMILIES["deepseek_v3"] | {
    "vocab_size": 37,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "dtype": "float32",
}
# Experts of a whole number of hash tiles, as for an engine on a GPU: their digests are summed over
# the ranks that own them.
TINY_FAMILIES["qwen3_moe of tiles"] = TINY_FAMILIES["qwen3_moe"] | {
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
}
# Weights of whole blocks for weights.quantization; an expert of the second is also whole tiles.
TINY_FAMILIES["qwen3 of blocks"] = TINY_FAMILIES["qwen3"] | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "head_dim": 32,
}
TINY_FAMILIES["qwen3_moe of blocks"] = (
    TINY_FAMILIES["qwen3 of blocks"] | TINY_FAMILIES["qwen3_moe"] | {"moe_intermediate_size": 128}
)
TINY_FAMILIES["qwen3_moe of blocks and tiles"] = TINY_FAMILIES["qwen3_moe of blocks"] | {
    "moe_intermediate_size": 256
}


def make_model_folder(folder: Path, family: str, scale: float = 1.0) -> Path:
    """Writes a Hugging Face folder with every tensor of the family's table, at random."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY_SIZES | TINY_FAMILIES[family]))
    shape = HfConfig(folder).shape()
    generator = torch.Generator().manual_seed(0)
    names = parameter_names(shape)
    pieces = dict(piece for name in names for piece in map_parameter(name, shape).pieces)
    tensors = {hf: scale * torch.randn(size, generator=generator) for hf, size in pieces.items()}
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] *= 0.2  # with larger ones no token would choose some experts
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights_config_tree(
    model: Path, sizes: dict[str, int], weights: dict[str, Any]
) -> dict[str, Any]:
    """Returns the configuration of NUM_RANKS trainer ranks.

    `sizes`: parallel sizes, and numbers of layers under Megatron's name.
    """
    ranks = 1
    for name in ("tensor_model", "pipeline_model", "context"):
        ranks *= sizes.get(name, 1)
    return {
        "run": {"dir": "unused", "steps": 1},
        "model": {"path": str(model), "context_tokens": 64},
        "data": {"train": "unused"},
        "rollout": {"max_new_tokens": 32},
        "algorithm": {"prompts_per_step": 4, "samples_per_prompt": 2},
        "trainer": {
            "precision": "fp32",
            "data_parallel_size": NUM_RANKS // ranks,
            "collective_timeout_s": 100,
        },
        "weights": {"bucket_bytes": 20000, "update_timeout_s": UPDATE_TIMEOUT_S} | weights,
        "megatron": {
            name if "layers" in name else f"{name}_parallel_size": size
            for name, size in sizes.items()
        },
        "sglang": {} if model.name.endswith("tiles") else {"device": "cpu"},
    }
