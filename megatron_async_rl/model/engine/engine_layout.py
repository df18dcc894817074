"""How SGLang stores a Hugging Face model: fused tensors, and their slices on tensor-parallel ranks.

SGLang fuses q, k and v (with latent attention the two projections to latent vectors), gate and up,
and all experts of a layer; its tensor-parallel ranks hold slices, and it pads the vocabulary with
zero rows. Used by the digests of a weight update (weights/digest.py) and by the weight plan.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_async_rl.model.shape import LatentShape, LinearShape, ModelShape

_QKV = ("q_proj", "k_proj", "v_proj")
FUSED = {"qkv_proj": _QKV, "gate_up_proj": ("gate_proj", "up_proj")}
_LATENT_DOWN = "fused_qkv_a_proj_with_mqa"
LATENT_FUSED: dict[str, tuple[str, ...]] = {
    _LATENT_DOWN: ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
VOCABULARY = ("embed_tokens", "lm_head")
VOCABULARY_MULTIPLE = 64  # SGLang pads the vocabulary to a multiple of it
_SPLIT_COLUMNS = ("o_proj", "down_proj", "out_proj")  # along the input dimension
_SPLIT_ROWS = (*VOCABULARY, *_QKV, "gate_proj", "up_proj", "q_b_proj", "kv_b_proj")
# The last holds A_log and dt_bias.
_LINEAR_SPLIT_ROWS = ("in_proj_qkvz", "in_proj_ba", "conv1d", "linear_attn")
_EXPERT = re.compile(
    r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|weight_scale_inv)"
)
_FUSED_EXPERTS = re.compile(r".*\.w(13|2)_weight(_scale_inv)?")


@dataclass(frozen=True, slots=True)
class EngineSlot:
    """The place of a Hugging Face tensor in an SGLang server."""

    tensor: str
    """Name of the fused engine tensor."""
    part: int
    """Index of the part that this tensor fills, along the engine tensor's first dimension."""
    num_parts: int
    leaf: str
    """Name of the Hugging Face module, such as q_proj. It decides how ranks split the tensor."""

    @property
    def is_fused_expert(self) -> bool:
        return _FUSED_EXPERTS.fullmatch(self.tensor) is not None


def engine_slot(name: str, shape: ModelShape) -> EngineSlot:
    """Returns the slot of a Hugging Face tensor."""
    if expert := _EXPERT.fullmatch(name):
        number, leaf, kind = int(expert[2]), expert[3], expert[4]
        if leaf == "down_proj":
            return EngineSlot(f"{expert[1]}.w2_{kind}", number, shape.num_experts, leaf)
        part = 2 * number + (leaf == "up_proj")
        return EngineSlot(f"{expert[1]}.w13_{kind}", part, 2 * shape.num_experts, leaf)
    if shape.linear:
        name = name.replace(".self_attn.", ".")
    module, _, kind = name.rpartition(".")
    stem, _, leaf = module.rpartition(".")
    for fused, parts in _fused_by(shape).items():
        if leaf in parts:
            return EngineSlot(f"{stem}.{fused}.{kind}", parts.index(leaf), len(parts), leaf)
    return EngineSlot(name, 0, 1, leaf)


def _fused_by(shape: ModelShape) -> dict[str, tuple[str, ...]]:
    """Returns the engine's fused tensors of MLP and attention, with their parts."""
    if not shape.latent:
        return FUSED
    if shape.latent.q_lora_rank:
        return LATENT_FUSED
    return {name: parts for name, parts in LATENT_FUSED.items() if name != _LATENT_DOWN}


def engine_split(leaf: str, num_dims: int) -> int | None:
    """Returns the dimension of a Hugging Face tensor that ranks split; None: each has all of it."""
    if leaf in _SPLIT_COLUMNS and num_dims > 1:
        return 1
    return 0 if leaf in _SPLIT_ROWS + _LINEAR_SPLIT_ROWS else None


def engine_pieces(
    leaf: str, sizes: tuple[int, ...], shape: ModelShape, tp: int
) -> list[tuple[int, int, int]]:
    """Returns (rank, start, end) of all parts of a Hugging Face tensor that `tp` ranks hold.

    The half-open ranges are along `engine_split`. A rank has one, but of a linear attention's
    convolution one for each of queries, keys and values.
    """
    if leaf != "conv1d" or not shape.linear:
        return [
            (rank, *bounds) for rank, bounds in enumerate(engine_ranges(leaf, sizes, shape, tp))
        ]
    pieces, first = [], 0
    for size in shape.linear.conv_sections:
        step = size // tp
        pieces += [(r, first + r * step, first + (r + 1) * step) for r in range(tp)]
        first += size
    return pieces


def engine_ranges(
    leaf: str, sizes: tuple[int, ...], shape: ModelShape, tp: int
) -> list[tuple[int, int]]:
    """Returns the half-open range of a Hugging Face tensor that each of `tp` ranks holds.

    The range is along `engine_split`. With more ranks than KV heads, ranks share one. Padding of
    the vocabulary belongs to no range.
    """
    split = engine_split(leaf, len(sizes))
    if split is None:
        return [(0, sizes[0])] * tp
    size = sizes[split]
    if leaf in VOCABULARY:
        step = padded_vocabulary(size) // tp
        return [(min(r * step, size), min((r + 1) * step, size)) for r in range(tp)]
    copies = 1
    if leaf in ("k_proj", "v_proj") and shape.num_query_groups < tp:
        copies = tp // shape.num_query_groups
    step = size * copies // tp
    return [(r // copies * step, (r // copies + 1) * step) for r in range(tp)]


def padded_vocabulary(vocab_size: int) -> int:
    """Returns the rows of SGLang's embedding over all ranks."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def engine_sizes(shape: ModelShape, tp: int) -> Iterator[tuple[str, list[int]]]:
    """Yields each engine tensor with its number of elements on every rank, without padding.

    Computed from the engine's model definition, independently of the slots and ranges above.
    """
    hidden = shape.hidden_size
    step = padded_vocabulary(shape.vocab_size) // tp
    rows = [max(0, min(step, shape.vocab_size - r * step)) * hidden for r in range(tp)]
    yield "model.embed_tokens.weight", rows
    if not shape.tied:
        yield "lm_head.weight", rows
    yield "model.norm.weight", [hidden] * tp
    for layer in range(shape.num_layers):
        for name, size in _layer_sizes(shape, layer, tp):
            yield f"model.layers.{layer}.{name}", [size] * tp


def _attention_sizes(shape: ModelShape, tp: int) -> Iterator[tuple[str, int]]:
    hidden, head = shape.hidden_size, shape.kv_channels
    heads = shape.num_attention_heads // tp * head
    gates = heads if shape.linear else 0
    qkv = gates + heads + 2 * max(1, shape.num_query_groups // tp) * head
    yield "qkv_proj.weight", qkv * hidden
    yield "o_proj.weight", heads * hidden
    if shape.family.qkv_bias:
        yield "qkv_proj.bias", qkv
    if shape.family.qk_norm:
        yield "q_norm.weight", head
        yield "k_norm.weight", head


def _latent_attention_sizes(
    shape: ModelShape, latent: LatentShape, tp: int
) -> Iterator[tuple[str, int]]:
    hidden, heads = shape.hidden_size, shape.num_attention_heads // tp
    queries = heads * shape.kv_channels
    down = latent.kv_lora_rank + latent.qk_rope_head_dim
    if latent.q_lora_rank:
        yield f"{_LATENT_DOWN}.weight", (latent.q_lora_rank + down) * hidden
        yield "q_a_layernorm.weight", latent.q_lora_rank
        yield "q_b_proj.weight", queries * latent.q_lora_rank
    else:
        yield "q_proj.weight", queries * hidden
        yield "kv_a_proj_with_mqa.weight", down * hidden
    yield "kv_a_layernorm.weight", latent.kv_lora_rank
    key_and_value = latent.qk_nope_head_dim + latent.v_head_dim
    yield "kv_b_proj.weight", heads * key_and_value * latent.kv_lora_rank
    yield "o_proj.weight", heads * latent.v_head_dim * hidden


def _linear_attention_sizes(linear: LinearShape, hidden: int, tp: int) -> Iterator[tuple[str, int]]:
    heads, value = linear.num_value_heads // tp, linear.conv_sections[2] // tp
    conv = 2 * linear.conv_sections[0] // tp + value
    yield "in_proj_qkvz.weight", (conv + value) * hidden
    yield "in_proj_ba.weight", 2 * heads * hidden
    yield "conv1d.weight", conv * linear.conv_width
    yield "dt_bias", heads
    yield "A_log", heads
    yield "norm.weight", linear.value_head_dim
    yield "out_proj.weight", value * hidden


def _layer_sizes(shape: ModelShape, layer: int, tp: int) -> Iterator[tuple[str, int]]:
    hidden, linear = shape.hidden_size, shape.linear
    yield "input_layernorm.weight", hidden
    yield "post_attention_layernorm.weight", hidden
    prefix = "" if linear else "self_attn."
    if linear and shape.is_linear(layer):
        prefix, attention = "linear_attn.", _linear_attention_sizes(linear, hidden, tp)
    elif shape.latent:
        attention = _latent_attention_sizes(shape, shape.latent, tp)
    else:
        attention = _attention_sizes(shape, tp)
    for name, size in attention:
        yield prefix + name, size
    if shape.num_experts and layer >= shape.num_dense_layers:
        ffn = shape.num_experts * (shape.expert_ffn_hidden_size // tp) * hidden
        yield "mlp.gate.weight", shape.num_experts * hidden
        if shape.family.router_bias:
            yield "mlp.gate.e_score_correction_bias", shape.num_experts
        if shape.shared_ffn_hidden_size:
            shared = shape.shared_ffn_hidden_size // tp * hidden
            name = "shared_expert" if linear else "shared_experts"
            yield f"mlp.{name}.gate_up_proj.weight", 2 * shared
            yield f"mlp.{name}.down_proj.weight", shared
            if linear:
                yield "mlp.shared_expert_gate.weight", hidden
        yield "mlp.experts.w13_weight", 2 * ffn
        yield "mlp.experts.w2_weight", ffn
    else:
        ffn = shape.ffn_hidden_size // tp * hidden
        yield "mlp.gate_up_proj.weight", 2 * ffn
        yield "mlp.down_proj.weight", ffn
