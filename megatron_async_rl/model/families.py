"""Model families as tables: how Megatron's parameters correspond to Hugging Face tensors.

A rule lists the Hugging Face tensors that make up one Megatron parameter, the shape of each in
named dimensions, the dimension that tensor parallelism splits, and how the parts are joined:

  one      the Hugging Face tensor itself
  stack    [gate; up]. A tensor-parallel rank holds [gate_r; up_r], not a slice of the whole
  qkv      per KV head: its query heads, its key head, its value head. A rank holds whole KV
           groups, so its rows of q, of k and of v are each contiguous in the Hugging Face tensors
  gated_qkv  the same, where q_proj has behind each query head the gate of its output; here the
           gates of a group stand behind its query heads
  conv     per key head of a linear attention: the channels of queries, of keys and of its value
           heads, which the one Hugging Face tensor has one after another for all heads

A new family is one entry of FAMILIES (docs/weights.md); weights/mapping.py applies the tables to
tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    """Sent in float32, as which the engine holds it, whatever the precision of the others."""
    beside: str = ""
    """Parameter of the same layer in whose bucket it is sent. The engine fuses the two and forgets
    one that comes without the other."""


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
LATENT_ATTENTION = (
    Rule("input_layernorm.weight", (("input_layernorm.weight", "hidden"),)),
    Rule(
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        (("self_attn.kv_a_layernorm.weight", "kv_rank"),),
    ),
    Rule(
        "self_attention.linear_kv_up_proj.weight",
        (("self_attn.kv_b_proj.weight", "kv_up kv_rank"),),
        0,
    ),
    Rule("self_attention.linear_proj.weight", (("self_attn.o_proj.weight", "hidden v"),), 1),
)
_KV_DOWN = "self_attention.linear_kv_down_proj.weight"
_KV_LATENT = (("self_attn.kv_a_proj_with_mqa.weight", "kv_latent hidden"),)
FULL_QUERIES = (
    Rule("self_attention.linear_q_proj.weight", (("self_attn.q_proj.weight", "q hidden"),), 0),
    Rule(_KV_DOWN, _KV_LATENT),
)
LATENT_QUERIES = (
    Rule(
        "self_attention.linear_q_down_proj.weight",
        (("self_attn.q_a_proj.weight", "q_rank hidden"),),
    ),
    Rule(_KV_DOWN, _KV_LATENT, beside="self_attention.linear_q_down_proj.weight"),
    Rule(
        "self_attention.linear_q_up_proj.layer_norm_weight",
        (("self_attn.q_a_layernorm.weight", "q_rank"),),
    ),
    Rule("self_attention.linear_q_up_proj.weight", (("self_attn.q_b_proj.weight", "q q_rank"),), 0),
)
# The engine's router computes with the weight in the precision of the others.
GROUPED_ROUTER = (ROUTER[0], BIASED_ROUTER[1])
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

SHARED_EXPERT = (
    *(
        Rule(
            rule.megatron,
            tuple((hf.replace("experts", "expert"), dims) for hf, dims in rule.pieces),
            rule.split,
            rule.join,
        )
        for rule in SHARED_EXPERTS
    ),
    Rule("mlp.shared_experts.gate_weight", (("mlp.shared_expert_gate.weight", "one hidden"),)),
)
GATED_ATTENTION = (
    ATTENTION[0],
    Rule(
        "self_attention.linear_qkv.weight",
        (
            ("self_attn.q_proj.weight", "gated_q hidden"),
            ("self_attn.k_proj.weight", "kv hidden"),
            ("self_attn.v_proj.weight", "kv hidden"),
        ),
        0,
        "gated_qkv",
    ),
    ATTENTION[2],
)
GATED_DELTA_NET = (
    Rule("input_layernorm.weight", (("input_layernorm.weight", "hidden"),)),
    Rule(
        "self_attention.in_proj_qkvz.weight",
        (("linear_attn.in_proj_qkvz.weight", "linear_qkvz hidden"),),
        0,
    ),
    Rule(
        "self_attention.in_proj_ba.weight",
        (("linear_attn.in_proj_ba.weight", "linear_ba hidden"),),
        0,
    ),
    Rule(
        "self_attention.conv_weight",
        (("linear_attn.conv1d.weight", "linear_conv one conv_width"),),
        0,
        "conv",
    ),
    Rule("self_attention.dt_bias", (("linear_attn.dt_bias", "linear_heads"),), 0),
    Rule("self_attention.A_log", (("linear_attn.A_log", "linear_heads"),), 0, fp32=True),
    Rule("self_attention.norm_weight", (("linear_attn.norm.weight", "linear_head"),)),
    Rule(
        "self_attention.out_proj.weight", (("linear_attn.out_proj.weight", "hidden linear_v"),), 1
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


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentShape:
    """The sizes of multi-head latent attention, by the names in config.json."""

    q_lora_rank: int
    """0: queries are made from the hidden state."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    """Elements of a head that RoPE rotates; keys share them over all heads."""
    v_head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearShape:
    """The sizes of linear attention, a gated delta net."""

    full_attention_interval: int
    """Every so many layers the last has full attention."""
    num_key_heads: int
    num_value_heads: int
    """A multiple of the number of key heads."""
    key_head_dim: int
    value_head_dim: int
    conv_width: int
    """Tokens that the convolution before the attention combines."""

    @property
    def conv_sections(self) -> tuple[int, int, int]:
        """Channels of queries, keys and values of all heads."""
        key = self.num_key_heads * self.key_head_dim
        return key, key, self.num_value_heads * self.value_head_dim

    @property
    def dims(self) -> dict[str, int]:
        conv, value = sum(self.conv_sections), self.conv_sections[2]
        return {
            "one": 1,
            "linear_qkvz": conv + value,
            "linear_ba": 2 * self.num_value_heads,
            "linear_conv": conv,
            "conv_width": self.conv_width,
            "linear_heads": self.num_value_heads,
            "linear_head": self.value_head_dim,
            "linear_v": value,
        }


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
    latent: LatentShape | None = None
    """With latent attention. kv_channels is then the size of a query's head."""
    linear: LinearShape | None = None
    """With linear attention in most layers."""

    def is_linear(self, layer: int) -> bool:
        """Returns whether the layer with this global number has linear attention."""
        return self.linear is not None and (layer + 1) % self.linear.full_attention_interval != 0

    def layer_rules(self, layer: int) -> tuple[Rule, ...]:
        """Returns the rules of the layer with this global number."""
        if self.is_linear(layer):
            return self.family.linear_layer
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
            "gated_q": 2 * self.num_attention_heads * self.kv_channels,
            **(self._latent_dims(self.latent) if self.latent else {}),
            **(self.linear.dims if self.linear else {}),
        }

    def _latent_dims(self, latent: LatentShape) -> dict[str, int]:
        heads = self.num_attention_heads
        return {
            "q_rank": latent.q_lora_rank,
            "kv_rank": latent.kv_lora_rank,
            "kv_latent": latent.kv_lora_rank + latent.qk_rope_head_dim,
            "kv_up": heads * (latent.qk_nope_head_dim + latent.v_head_dim),
            "v": heads * latent.v_head_dim,
        }

    def cached_per_token(self, tp: int) -> float:
        """Returns the elements of a token in the engine's cache, per layer and rank on average.

        Ranks beyond the number of key-value heads hold one each; all hold the whole latent vector.
        """
        if self.latent:
            return self.dims["kv_latent"]
        cached = 2 * max(1, self.num_query_groups / tp) * self.kv_channels
        return cached * self._full_layers / self.num_layers if self.linear else cached

    @property
    def _full_layers(self) -> int:
        return sum(not self.is_linear(layer) for layer in range(self.num_layers))

    @property
    def attention_width(self) -> int:
        """Query heads times the mean size of a head of keys and of values, per layer on average."""
        dims = self.dims
        if self.linear:
            return dims["q"] * self._full_layers // self.num_layers
        return (dims["q"] + dims["v"]) // 2 if self.latent else dims["q"]

    @property
    def attention_parameters(self) -> int:
        """Weights of a layer's attention on average, without norms."""
        hidden, dims = self.hidden_size, self.dims
        if self.linear:
            full = hidden * (dims["gated_q"] + dims["q"] + 2 * dims["kv"])
            linear = hidden * (dims["linear_qkvz"] + dims["linear_ba"] + dims["linear_v"])
            num_full = self._full_layers
            return (num_full * full + (self.num_layers - num_full) * linear) // self.num_layers
        if not self.latent:
            return 2 * hidden * (dims["q"] + dims["kv"])
        q_rank = dims["q_rank"]
        queries = q_rank * (hidden + dims["q"]) if q_rank else hidden * dims["q"]
        keys_and_values = hidden * dims["kv_latent"] + dims["kv_rank"] * dims["kv_up"]
        return queries + keys_and_values + hidden * dims["v"]


@dataclass(frozen=True, slots=True)
class ParameterMapping:
    """A rule applied to one parameter of one model."""

    rule: Rule
    pieces: tuple[tuple[str, tuple[int, ...]], ...]
    """(Hugging Face name, full shape) in joining order."""

    bucket: str
    """Megatron parameter with whose tensors it is sent in one bucket, mostly itself."""

    @property
    def in_vocabulary(self) -> bool:
        """True if Megatron pads the first dimension to ModelShape.padded_vocab_size."""
        return self.rule.pieces[0][1].startswith("vocab")

    def sections(self, shape: ModelShape) -> tuple[int, ...]:
        """Returns the rows of the parts of the one Hugging Face tensor that are split one by one.

        Empty if tensor parallelism splits whole tensors.
        """
        return shape.linear.conv_sections if shape.linear and self.rule.join == "conv" else ()


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
    bucket = name[: layer.end()] + rule.beside if layer and rule.beside else name
    return ParameterMapping(rule, tuple(pieces), bucket)


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
