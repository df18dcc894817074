"""Model families as tables: how Megatron's parameters correspond to Hugging Face tensors.

A rule lists the Hugging Face tensors that make up one Megatron parameter, the shape of each in
named dimensions, the dimension that tensor parallelism splits, and how the parts are joined:

  one      the Hugging Face tensor itself
  stack    [gate; up]. A tensor-parallel rank holds [gate_r; up_r], not a slice of the whole
  qkv      per KV head: its query heads, its key head, its value head. A rank holds whole KV
           groups, so its rows of q, of k and of v are each contiguous in the Hugging Face tensors

A new family is one entry of FAMILIES (docs/weights.md); weights/mapping.py applies the tables to
tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Join = Literal["one", "stack", "qkv"]


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
    """Sent in float32, as which the engine holds it, whatever the precision of the others."""


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


TOP = (
    Rule("embedding.word_embeddings.weight", (("model.embed_tokens.weight", "vocab hidden"),), 0),
    Rule("decoder.final_layernorm.weight", (("model.norm.weight", "hidden"),)),
    Rule("output_layer.weight", (("lm_head.weight", "vocab hidden"),), 0),
)
ATTENTION = (
    Rule("self_attention.linear_qkv.layer_norm_weight", (("input_layernorm.weight", "hidden"),)),
    Rule(
        "self_attention.linear_qkv.weight",
        (
            ("self_attn.q_proj.weight", "q hidden"),
            ("self_attn.k_proj.weight", "kv hidden"),
            ("self_attn.v_proj.weight", "kv hidden"),
        ),
        0,
        "qkv",
    ),
    Rule("self_attention.linear_proj.weight", (("self_attn.o_proj.weight", "hidden q"),), 1),
)
QKV_BIAS = (
    Rule(
        "self_attention.linear_qkv.bias",
        (
            ("self_attn.q_proj.bias", "q"),
            ("self_attn.k_proj.bias", "kv"),
            ("self_attn.v_proj.bias", "kv"),
        ),
        0,
        "qkv",
    ),
)
QK_NORM = (
    Rule("self_attention.q_layernorm.weight", (("self_attn.q_norm.weight", "head"),)),
    Rule("self_attention.k_layernorm.weight", (("self_attn.k_norm.weight", "head"),)),
)
MLP = (
    Rule("mlp.linear_fc1.layer_norm_weight", (("post_attention_layernorm.weight", "hidden"),)),
    Rule(
        "mlp.linear_fc1.weight",
        (("mlp.gate_proj.weight", "ffn hidden"), ("mlp.up_proj.weight", "ffn hidden")),
        0,
        "stack",
    ),
    Rule("mlp.linear_fc2.weight", (("mlp.down_proj.weight", "hidden ffn"),), 1),
)
ROUTER = (Rule("mlp.router.weight", (("mlp.gate.weight", "experts hidden"),)),)
EXPERTS = (
    Rule("pre_mlp_layernorm.weight", (("post_attention_layernorm.weight", "hidden"),)),
    Rule(
        "mlp.experts.local_experts.{e}.linear_fc1.weight",
        (
            ("mlp.experts.{e}.gate_proj.weight", "expert_ffn hidden"),
            ("mlp.experts.{e}.up_proj.weight", "expert_ffn hidden"),
        ),
        0,
        "stack",
    ),
    Rule(
        "mlp.experts.local_experts.{e}.linear_fc2.weight",
        (("mlp.experts.{e}.down_proj.weight", "hidden expert_ffn"),),
        1,
    ),
)
# Engine and router compute with float32 copies of both.
BIASED_ROUTER = (
    Rule("mlp.router.weight", (("mlp.gate.weight", "experts hidden"),), fp32=True),
    Rule("mlp.router.expert_bias", (("mlp.gate.e_score_correction_bias", "experts"),), fp32=True),
)
SHARED_EXPERTS = (
    Rule(
        "mlp.shared_experts.linear_fc1.weight",
        (
            ("mlp.shared_experts.gate_proj.weight", "shared_ffn hidden"),
            ("mlp.shared_experts.up_proj.weight", "shared_ffn hidden"),
        ),
        0,
        "stack",
    ),
    Rule(
        "mlp.shared_experts.linear_fc2.weight",
        (("mlp.shared_experts.down_proj.weight", "hidden shared_ffn"),),
        1,
    ),
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
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of one model, by Megatron's names."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    padded_vocab_size: int
    """Rows of Megatron's embedding, divisible by TP. Hugging Face has the first vocab_size."""
    tied: bool
    """lm_head.weight is model.embed_tokens.weight and is not stored separately."""
    num_experts: int = 0
    expert_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0
    """Of all shared experts of a layer together, which every token passes."""
    num_dense_layers: int = 0
    """The first layers, which have an MLP instead of experts."""

    def layer_rules(self, layer: int) -> tuple[Rule, ...]:
        """Returns the rules of the layer with this global number."""
        return self.family.dense_layer if layer < self.num_dense_layers else self.family.layer

    @property
    def dims(self) -> dict[str, int]:
        """The sizes of the dimensions that the rules name."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "head": self.kv_channels,
            "q": self.num_attention_heads * self.kv_channels,
            "kv": self.num_query_groups * self.kv_channels,
            "experts": self.num_experts,
            "expert_ffn": self.expert_ffn_hidden_size,
            "shared_ffn": self.shared_ffn_hidden_size,
        }


@dataclass(frozen=True, slots=True)
class ParameterMapping:
    """A rule applied to one parameter of one model."""

    rule: Rule
    pieces: tuple[tuple[str, tuple[int, ...]], ...]
    """(Hugging Face name, full shape) in joining order."""

    @property
    def in_vocabulary(self) -> bool:
        """True if Megatron pads the first dimension to ModelShape.padded_vocab_size."""
        return self.rule.pieces[0][1].startswith("vocab")


def map_parameter(name: str, shape: ModelShape) -> ParameterMapping:
    """Applies the rule of a Megatron parameter, named with global layer and expert numbers.

    Raises KeyError if the family's table has no rule for it.
    """
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    expert = re.search(r"\.local_experts\.(\d+)\.", name)
    relative = name[layer.end() :] if layer else name
    if expert:
        relative = relative.replace(f".{expert[1]}.", ".{e}.", 1)
    rules = shape.layer_rules(int(layer[1])) if layer else TOP
    rule = next((rule for rule in rules if rule.megatron == relative), None)
    if rule is None:
        table = f"the {shape.family.name} table of model/families.py"
        raise KeyError(f"{table} has no rule for {name}")
    prefix, dims = f"model.layers.{layer[1]}." if layer else "", shape.dims
    pieces = []
    for hf, dim_names in rule.pieces:
        if hf == "lm_head.weight" and shape.tied:
            hf = TOP[0].pieces[0][0]
        hf = prefix + (hf.replace("{e}", expert[1]) if expert else hf)
        pieces.append((hf, tuple(dims[dim] for dim in dim_names.split())))
    return ParameterMapping(rule, tuple(pieces))


def parameter_names(shape: ModelShape) -> Iterator[str]:
    """Yields the Megatron parameters that are sent, with global layer and expert numbers."""
    for rule in TOP:
        if not (shape.tied and rule.megatron == "output_layer.weight"):
            yield rule.megatron
    for layer in range(shape.num_layers):
        for rule in shape.layer_rules(layer):
            for expert in range(shape.num_experts) if "{e}" in rule.megatron else (0,):
                yield f"decoder.layers.{layer}.{rule.megatron}".replace("{e}", str(expert))


def shard_shape(name: str, shape: ModelShape, tp: int = 1) -> tuple[int, ...]:
    """Returns the shape of one tensor-parallel rank's shard of a Megatron parameter."""
    mapping = map_parameter(name, shape)
    sizes = list(mapping.pieces[0][1])
    sizes[0] = sum(piece[0] for _, piece in mapping.pieces)
    if mapping.in_vocabulary:
        sizes[0] = shape.padded_vocab_size
    if mapping.rule.split is not None:
        sizes[mapping.rule.split] //= tp
    return tuple(sizes)
