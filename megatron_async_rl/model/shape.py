"""The sizes of one model, and its Megatron parameters by the rules of its family."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron_async_rl.model.families import TOP, Family, Rule


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
    """Sum over the shared experts of a layer; every token passes all of them."""
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
    """Megatron parameter that shares its bucket; mostly the parameter itself."""

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


def num_parameters(shape: ModelShape) -> int:
    """Returns the elements of all parameters, with the padding of the vocabulary."""
    return sum(prod(shard_shape(name, shape)) for name in parameter_names(shape))
