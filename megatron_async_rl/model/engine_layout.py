"""How SGLang stores a Hugging Face model: fused tensors, and their slices on tensor-parallel ranks.

SGLang fuses q, k and v, gate and up, and all experts of a layer; its tensor-parallel ranks hold
slices, and it pads the vocabulary with zero rows. Used by the digests of a weight update
(weights/digest.py) and by the weight plan.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_async_rl.model.families import ModelShape

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
VOCABULARY = ("embed_tokens", "lm_head")
VOCABULARY_MULTIPLE = 64  # SGLang pads the vocabulary to a multiple of it
_SPLIT_COLUMNS = ("o_proj", "down_proj")  # along the input dimension
_SPLIT_ROWS = (*VOCABULARY, *(part for parts in FUSED.values() for part in parts))
_EXPERT = re.compile(
    r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|weight_scale_inv)"
)
_FUSED_EXPERTS = re.compile(r".*\.w(13|2)_weight(_scale_inv)?")


@dataclass(frozen=True, slots=True)
class EngineSlot:
    """Where an SGLang server stores a Hugging Face tensor."""

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
    module, _, kind = name.rpartition(".")
    stem, _, leaf = module.rpartition(".")
    for fused, parts in FUSED.items():
        if leaf in parts:
            return EngineSlot(f"{stem}.{fused}.{kind}", parts.index(leaf), len(parts), leaf)
    return EngineSlot(name, 0, 1, leaf)


def engine_split(leaf: str, num_dims: int) -> int | None:
    """Returns the dimension of a Hugging Face tensor that ranks split; None: each has all of it."""
    if leaf in _SPLIT_COLUMNS and num_dims > 1:
        return 1
    return 0 if leaf in _SPLIT_ROWS else None


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
    hidden, head = shape.hidden_size, shape.kv_channels
    step = padded_vocabulary(shape.vocab_size) // tp
    rows = [max(0, min(step, shape.vocab_size - r * step)) * hidden for r in range(tp)]
    yield "model.embed_tokens.weight", rows
    if not shape.tied:
        yield "lm_head.weight", rows
    yield "model.norm.weight", [hidden] * tp
    heads = shape.num_attention_heads // tp * head
    qkv = heads + 2 * max(1, shape.num_query_groups // tp) * head
    for layer in range(shape.num_layers):
        for name, size in _layer_sizes(shape, layer, tp, heads, qkv):
            yield f"model.layers.{layer}.{name}", [size] * tp


def _layer_sizes(
    shape: ModelShape, layer: int, tp: int, heads: int, qkv: int
) -> Iterator[tuple[str, int]]:
    """Yields a layer's tensors. `heads`, `qkv`: rows of the queries and of q, k, v on a rank."""
    hidden, head = shape.hidden_size, shape.kv_channels
    yield "input_layernorm.weight", hidden
    yield "post_attention_layernorm.weight", hidden
    yield "self_attn.qkv_proj.weight", qkv * hidden
    yield "self_attn.o_proj.weight", heads * hidden
    if shape.family.qkv_bias:
        yield "self_attn.qkv_proj.bias", qkv
    if shape.family.qk_norm:
        yield "self_attn.q_norm.weight", head
        yield "self_attn.k_norm.weight", head
    if shape.num_experts and layer >= shape.num_dense_layers:
        ffn = shape.num_experts * (shape.expert_ffn_hidden_size // tp) * hidden
        yield "mlp.gate.weight", shape.num_experts * hidden
        if shape.family.router_bias:
            yield "mlp.gate.e_score_correction_bias", shape.num_experts
        if shape.shared_ffn_hidden_size:
            shared = shape.shared_ffn_hidden_size // tp * hidden
            yield "mlp.shared_experts.gate_up_proj.weight", 2 * shared
            yield "mlp.shared_experts.down_proj.weight", shared
        yield "mlp.experts.w13_weight", 2 * ffn
        yield "mlp.experts.w2_weight", ffn
    else:
        ffn = shape.ffn_hidden_size // tp * hidden
        yield "mlp.gate_up_proj.weight", 2 * ffn
        yield "mlp.down_proj.weight", ffn
