"""Model families as data: Hugging Face name <-> Megatron parameter name, and how the one is laid out in the other.

A family is a table of rules. A rule says which HF tensors a Megatron parameter is made of, the shape of each in named
dimensions, along which dimension tensor parallelism cuts them, and how the cuts are joined:

  one      the HF tensor itself
  stack    [gate; up]; under TP each rank holds [gate_r; up_r], so the full tensors are not simply cut
  qkv      per KV group: its query heads, then its key head, then its value head. A rank's groups are whole, so its rows
           of q, of k and of v are each contiguous in the HF tensors

The join works on one rank's cuts. That is all there is to resharding: `from_hf` reads the cuts of one rank and joins
them, `to_hf` splits the shards of all ranks and concatenates. Both are pure; torch is needed, Megatron is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Join = Literal["one", "stack", "qkv"]
Index = tuple[slice, ...]
Read = Callable[[str, Index], Tensor]
"""(HF name, index) -> that part of the HF tensor, and no more of it."""


@dataclass(frozen=True, slots=True)
class Rule:
    megatron: str
    """Parameter name; below a layer in the layers' table. `{e}` is the expert's number."""
    pieces: tuple[tuple[str, str], ...]
    """(HF name, its dimensions by name, see ModelShape.dims) in joining order."""
    split: int | None = None
    """The dimension that tensor parallelism cuts, of the pieces and of the parameter; None: every rank has all."""
    join: Join = "one"


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    architecture: str
    """What config.json calls it."""
    layer: tuple[Rule, ...]
    qk_norm: bool = False
    qkv_bias: bool = False
    experts: bool = False


TOP = (
    Rule("embedding.word_embeddings.weight", (("model.embed_tokens.weight", "vocab hidden"),), 0),
    Rule("decoder.final_layernorm.weight", (("model.norm.weight", "hidden"),)),
    Rule("output_layer.weight", (("lm_head.weight", "vocab hidden"),), 0),
)
_ATTENTION = (
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
_MLP = (
    Rule("mlp.linear_fc1.layer_norm_weight", (("post_attention_layernorm.weight", "hidden"),)),
    Rule(
        "mlp.linear_fc1.weight",
        (("mlp.gate_proj.weight", "ffn hidden"), ("mlp.up_proj.weight", "ffn hidden")),
        0,
        "stack",
    ),
    Rule("mlp.linear_fc2.weight", (("mlp.down_proj.weight", "hidden ffn"),), 1),
)
_QKV_BIAS = (
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
_QK_NORM = (
    Rule("self_attention.q_layernorm.weight", (("self_attn.q_norm.weight", "head"),)),
    Rule("self_attention.k_layernorm.weight", (("self_attn.k_norm.weight", "head"),)),
)
_EXPERTS = (
    Rule("pre_mlp_layernorm.weight", (("post_attention_layernorm.weight", "hidden"),)),
    Rule("mlp.router.weight", (("mlp.gate.weight", "experts hidden"),)),
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

FAMILIES = (
    Family("llama", "LlamaForCausalLM", _ATTENTION + _MLP),
    Family("qwen2", "Qwen2ForCausalLM", _ATTENTION + _QKV_BIAS + _MLP, qkv_bias=True),
    Family("qwen3", "Qwen3ForCausalLM", _ATTENTION + _QK_NORM + _MLP, qk_norm=True),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _ATTENTION + _QK_NORM + _EXPERTS,
        qk_norm=True,
        experts=True,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of one model, in Megatron's words."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    padded_vocab_size: int
    """Rows of Megatron's embedding: vocab_size rounded up so that TP divides it. HF has the first vocab_size."""
    tied: bool
    """lm_head.weight is model.embed_tokens.weight, and not in the HF folder."""
    num_experts: int = 0
    expert_ffn_hidden_size: int = 0

    @property
    def dims(self) -> dict[str, int]:
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "head": self.kv_channels,
            "q": self.num_attention_heads * self.kv_channels,
            "kv": self.num_query_groups * self.kv_channels,
            "experts": self.num_experts,
            "expert_ffn": self.expert_ffn_hidden_size,
        }


@dataclass(frozen=True, slots=True)
class Placed:
    """A rule applied to one parameter: names and shapes filled in."""

    rule: Rule
    pieces: tuple[tuple[str, tuple[int, ...]], ...]
    """(HF name, full HF shape) in joining order."""


def place(name: str, shape: ModelShape) -> Placed:
    """Finds the rule of a Megatron parameter; `name` has the layer's global number."""
    layer, expert = (
        re.match(r"decoder\.layers\.(\d+)\.", name),
        re.search(r"\.local_experts\.(\d+)\.", name),
    )
    below = name[layer.end() :] if layer else name
    if expert:
        below = below.replace(f".{expert[1]}.", ".{e}.", 1)
    for rule in shape.family.layer if layer else TOP:
        if rule.megatron == below:
            break
    else:
        raise KeyError(
            f"the {shape.family.name} table of weights/mapping.py has no rule for {name}"
        )
    prefix, dims = f"model.layers.{layer[1]}." if layer else "", shape.dims
    pieces = []
    for hf, named in rule.pieces:
        if hf == "lm_head.weight" and shape.tied:
            hf = TOP[0].pieces[0][0]
        hf = prefix + (hf.replace("{e}", expert[1]) if expert else hf)
        pieces.append((hf, tuple(dims[d] for d in named.split())))
    return Placed(rule, tuple(pieces))


def local_shape(name: str, shape: ModelShape, tp: int = 1) -> tuple[int, ...]:
    """The shape of one rank's shard."""
    placed = place(name, shape)
    sizes = list(placed.pieces[0][1])
    sizes[0] = sum(piece[0] for _, piece in placed.pieces)
    if placed.rule.pieces[0][1].startswith("vocab"):
        sizes[0] = shape.padded_vocab_size
    if placed.rule.split is not None:
        sizes[placed.rule.split] //= tp
    return tuple(sizes)


def from_hf(name: str, read: Read, shape: ModelShape, rank: int = 0, tp: int = 1) -> Tensor:
    """The shard of one tensor-parallel rank (the full parameter with tp = 1), reading only what is in it."""
    placed = place(name, shape)
    cuts = []
    for hf, full in placed.pieces:
        index = [slice(None)] * len(full)
        if placed.rule.split is not None:
            size = full[placed.rule.split]
            rows = (
                shape.padded_vocab_size if placed.rule.pieces[0][1].startswith("vocab") else size
            ) // tp
            index[placed.rule.split] = slice(min(rank * rows, size), min((rank + 1) * rows, size))
        cuts.append(read(hf, tuple(index)))
    joined = _join(placed.rule.join, cuts, shape)
    missing = local_shape(name, shape, tp)[0] - joined.size(0)  # rows of the vocabulary's padding
    return torch.cat([joined, joined.new_zeros(missing, *joined.shape[1:])]) if missing else joined


def to_hf(name: str, shards: Sequence[Tensor], shape: ModelShape) -> list[tuple[str, Tensor]]:
    """The HF tensors in a Megatron parameter, out of the shards of all tensor-parallel ranks in rank order.

    A parameter that is not cut, or a full one, is a sequence of one. The vocabulary's padding is dropped.
    """
    placed = place(name, shape)
    split = placed.rule.split if placed.rule.split is not None else 0
    per_rank = [_split(placed.rule.join, shard, placed, shape) for shard in shards]
    out = []
    for (hf, full), cuts in zip(placed.pieces, zip(*per_rank, strict=True), strict=True):
        whole = torch.cat(cuts, split) if len(cuts) > 1 else cuts[0]
        out.append((hf, whole[: full[0]]))
    return out


def shard(name: str, full: Tensor, shape: ModelShape, rank: int, tp: int) -> Tensor:
    """Rank `rank`'s shard of a full Megatron parameter."""
    hf = dict(to_hf(name, [full], shape))
    return from_hf(name, lambda piece, index: hf[piece][index], shape, rank, tp)


def unshard(name: str, shards: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """The full Megatron parameter out of all ranks' shards."""
    hf = dict(to_hf(name, shards, shape))
    return from_hf(name, lambda piece, index: hf[piece][index], shape)


def _join(join: Join, cuts: list[Tensor], shape: ModelShape) -> Tensor:
    if join == "one":
        return cuts[0]
    if join == "stack":
        return torch.cat(cuts)
    q, k, v = cuts
    groups = k.size(0) // shape.kv_channels
    grouped = [t.reshape(groups, -1, *t.shape[1:]) for t in (q, k, v)]
    return torch.cat(grouped, 1).reshape(-1, *q.shape[1:])


def _split(join: Join, tensor: Tensor, placed: Placed, shape: ModelShape) -> list[Tensor]:
    if join == "one":
        return [tensor]
    if join == "stack":
        return list(tensor.chunk(len(placed.pieces)))
    head, per_group = shape.kv_channels, shape.num_attention_heads // shape.num_query_groups
    grouped = tensor.reshape(-1, (per_group + 2) * head, *tensor.shape[1:])
    return [
        t.reshape(-1, *tensor.shape[1:]) for t in grouped.split([per_group * head, head, head], 1)
    ]
