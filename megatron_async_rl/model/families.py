"""Model families as tables: how Megatron's parameters correspond to Hugging Face tensors.

A rule lists the Hugging Face tensors that make up one Megatron parameter, the shape of each in
named dimensions, the dimension that tensor parallelism splits, and how the parts are joined:

  one      the Hugging Face tensor itself
  stack    [gate; up]. A tensor-parallel rank holds [gate_r; up_r], not a slice of the whole
  qkv      per KV head: its query heads, its key head, its value head. A rank holds whole KV
           groups, so its rows of q, of k and of v are each contiguous in the Hugging Face tensors
  gated_qkv  the same, where q_proj has behind each query head the gate of its output; here the
           gates of a group follow its query heads
  conv     per key head of a linear attention: the channels of queries, of keys and of its value
           heads, which the one Hugging Face tensor has one after another for all heads

A new family is one entry of FAMILIES (docs/weights.md); shape.py applies the tables to a model's
sizes, weights/mapping.py to tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Join = Literal["one", "stack", "qkv", "gated_qkv", "conv"]


@dataclass(frozen=True, slots=True)
class Rule:
    megatron: str
    """Parameter name; in a family's layer table relative to the layer. `{e}` is the expert."""
    pieces: tuple[tuple[str, str], ...]
    """(Hugging Face name, names of its dimensions as in ModelShape.dims), in joining order."""
    split: int | None = None
    """Dimension that tensor parallelism splits; None: every rank holds the whole parameter."""
    join: Join = "one"
    fp32: bool = False
    """Sent in float32, as the engine holds it, with any precision of the other parameters."""
    beside: str = ""
    """Parameter of the same layer that shares its bucket. The engine fuses the two and loses one
    that comes without the other."""


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    architecture: str
    """Its name under `architectures` in config.json."""
    layer: tuple[Rule, ...]
    qk_norm: bool = False
    qkv_bias: bool = False
    experts: bool = False
    dense_layer: tuple[Rule, ...] = ()
    """Rules of the first layers, which have no experts (first_k_dense_replace in config.json)."""
    router_bias: bool = False
    """The router adds a bias to the sigmoid scores before it chooses, and weights by the scores."""
    rotary_percent: float = 1.0
    """Share of a head's elements that RoPE rotates, if config.json has no partial_rotary_factor."""
    latent_attention: bool = False
    """Multi-head latent attention: keys and values are made from a latent vector of each token."""
    latent_queries: bool = False
    """So are queries (q_lora_rank in config.json is not null)."""
    linear_layer: tuple[Rule, ...] = ()
    """Rules of layers with linear attention. `layer` has those of the others, one at the end of
    every full_attention_interval layers; their attention has an output gate. RMSNorm multiplies by
    1 + weight, except in linear attention, and a gate weights the shared experts."""


def _one(
    megatron: str,
    hf: str,
    dims: str,
    split: int | None = None,
    fp32: bool = False,
    beside: str = "",
) -> Rule:
    """Returns the rule of a parameter that is one Hugging Face tensor."""
    return Rule(megatron, ((hf, dims),), split, "one", fp32, beside)


def _qkv(tensor: str, query: str, key: str, join: Join = "qkv") -> Rule:
    """Returns the rule of the weight or bias of queries, keys and values, by their dimensions."""
    named = zip("qkv", (query, key, key), strict=True)
    pieces = tuple((f"self_attn.{name}_proj.{tensor}", dims) for name, dims in named)
    return Rule(f"self_attention.linear_qkv.{tensor}", pieces, 0, join)


def _mlp(megatron: str, hf: str, width: str) -> tuple[Rule, Rule]:
    """Returns the rules of a gated MLP with the hidden dimension `width`."""
    pieces = tuple((f"{hf}.{name}_proj.weight", f"{width} hidden") for name in ("gate", "up"))
    return (
        Rule(f"{megatron}.linear_fc1.weight", pieces, 0, "stack"),
        _one(f"{megatron}.linear_fc2.weight", f"{hf}.down_proj.weight", f"hidden {width}", 1),
    )


TOP = (
    _one("embedding.word_embeddings.weight", "model.embed_tokens.weight", "vocab hidden", 0),
    _one("decoder.final_layernorm.weight", "model.norm.weight", "hidden"),
    _one("output_layer.weight", "lm_head.weight", "vocab hidden", 0),
)
ATTENTION = (
    _one("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "hidden"),
    _qkv("weight", "q hidden", "kv hidden"),
    _one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden q", 1),
)
QKV_BIAS = (_qkv("bias", "q", "kv"),)
QK_NORM = (
    _one("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "head"),
    _one("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "head"),
)
MLP = (
    _one("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "hidden"),
    *_mlp("mlp", "mlp", "ffn"),
)
ROUTER = (_one("mlp.router.weight", "mlp.gate.weight", "experts hidden"),)
EXPERTS = (
    _one("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    *_mlp("mlp.experts.local_experts.{e}", "mlp.experts.{e}", "expert_ffn"),
)
# Engine and router compute with float32 copies of both.
BIASED_ROUTER = (
    _one("mlp.router.weight", "mlp.gate.weight", "experts hidden", fp32=True),
    _one("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", "experts", fp32=True),
)
LATENT_ATTENTION = (
    _one("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    _one(
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        "self_attn.kv_a_layernorm.weight",
        "kv_rank",
    ),
    _one(
        "self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", "kv_up kv_rank", 0
    ),
    _one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden v", 1),
)
_KV_DOWN = "self_attention.linear_kv_down_proj.weight"
_KV_LATENT = ("self_attn.kv_a_proj_with_mqa.weight", "kv_latent hidden")
_Q_DOWN = "self_attention.linear_q_down_proj.weight"
FULL_QUERIES = (
    _one("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", "q hidden", 0),
    _one(_KV_DOWN, *_KV_LATENT),
)
LATENT_QUERIES = (
    _one(_Q_DOWN, "self_attn.q_a_proj.weight", "q_rank hidden"),
    _one(_KV_DOWN, *_KV_LATENT, beside=_Q_DOWN),
    _one(
        "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attn.q_a_layernorm.weight",
        "q_rank",
    ),
    _one("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight", "q q_rank", 0),
)
# The engine's router computes with the weight in the precision of the others.
GROUPED_ROUTER = (ROUTER[0], BIASED_ROUTER[1])
SHARED_EXPERTS = _mlp("mlp.shared_experts", "mlp.shared_experts", "shared_ffn")
SHARED_EXPERT = (
    *_mlp("mlp.shared_experts", "mlp.shared_expert", "shared_ffn"),
    _one("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "one hidden"),
)
GATED_ATTENTION = (
    ATTENTION[0],
    _qkv("weight", "gated_q hidden", "kv hidden", "gated_qkv"),
    ATTENTION[2],
)
GATED_DELTA_NET = (
    _one("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    _one(
        "self_attention.in_proj_qkvz.weight",
        "linear_attn.in_proj_qkvz.weight",
        "linear_qkvz hidden",
        0,
    ),
    _one(
        "self_attention.in_proj_ba.weight", "linear_attn.in_proj_ba.weight", "linear_ba hidden", 0
    ),
    Rule(
        "self_attention.conv_weight",
        (("linear_attn.conv1d.weight", "linear_conv one conv_width"),),
        0,
        "conv",
    ),
    _one("self_attention.dt_bias", "linear_attn.dt_bias", "linear_heads", 0),
    _one("self_attention.A_log", "linear_attn.A_log", "linear_heads", 0, fp32=True),
    _one("self_attention.norm_weight", "linear_attn.norm.weight", "linear_head"),
    _one("self_attention.out_proj.weight", "linear_attn.out_proj.weight", "hidden linear_v", 1),
)

FAMILIES = (
    Family("llama", "LlamaForCausalLM", ATTENTION + MLP),
    Family("qwen2", "Qwen2ForCausalLM", ATTENTION + QKV_BIAS + MLP, qkv_bias=True),
    Family("qwen3", "Qwen3ForCausalLM", ATTENTION + QK_NORM + MLP, qk_norm=True),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        ATTENTION + QK_NORM + ROUTER + EXPERTS,
        qk_norm=True,
        experts=True,
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        ATTENTION + QKV_BIAS + BIASED_ROUTER + SHARED_EXPERTS + EXPERTS,
        qkv_bias=True,
        experts=True,
        dense_layer=ATTENTION + QKV_BIAS + MLP,
        router_bias=True,
        rotary_percent=0.5,
    ),
    *(
        Family(
            name,
            "DeepseekV3ForCausalLM",
            LATENT_ATTENTION + queries + GROUPED_ROUTER + SHARED_EXPERTS + EXPERTS,
            experts=True,
            dense_layer=LATENT_ATTENTION + queries + MLP,
            router_bias=True,
            latent_attention=True,
            latent_queries=queries is LATENT_QUERIES,
        )
        for name, queries in (
            ("deepseek_v3", LATENT_QUERIES),
            ("deepseek_v3 without q_lora_rank", FULL_QUERIES),
        )
    ),
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        GATED_ATTENTION + QK_NORM + ROUTER + SHARED_EXPERT + EXPERTS,
        qk_norm=True,
        experts=True,
        rotary_percent=0.25,
        linear_layer=GATED_DELTA_NET + ROUTER + SHARED_EXPERT + EXPERTS,
    ),
)
