"""The operations of a layer that are compared, with their names in SGLang and in Megatron.

Only outputs (or inputs) of modules in both libraries can be compared: Megatron fuses norms into the
linear layer after them, and some engines fuse more. An operation that one of them does not expose
is left out.

Suffixes: T tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

EMBEDDING, FINAL_NORM = "embedding", "final norm"
ROUTER, ROUTER_BIAS = "router", "router's bias"


class Held(Enum):
    """How the trainer's tensor-parallel ranks hold the output of an operation."""

    TOKENS = "each has part of the tokens with sequence parallelism, else all have everything"
    COLUMNS = "each has part of the columns"
    QKV = "each has the query, key and value columns of part of the groups, group by group"
    GATE_UP = "each has part of the gate's columns, then the same part of the up projection's"


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of every layer; names of modules are relative to the layer."""

    name: str
    engine: str
    trainer: str
    held: Held
    look_at: str
    """Parts to check if this is the first operation that differs."""
    output: int = 0
    """Index of the engine's output; an output that a layer lacks is left out."""
    is_input: bool = False
    """The input of the trainer's module, not its output."""
    replicated: bool = True
    """Every tensor-parallel rank of the engine has the whole output."""


LAYER = (
    Operation(
        "layer input", "input_layernorm", "", Held.TOKENS,
        "the sum of the layer before: a scale or bias that one side adds",
        output=1, is_input=True,
    ),
    Operation(
        "qkv", "self_attn.qkv_proj", "self_attention.linear_qkv", Held.QKV,
        "rms_norm_eps, the input norm's weight, the qkv weights and biases",
        replicated=False,
    ),
    *(
        Operation(
            "queries", f"self_attn.{engine}", f"self_attention.{trainer}", Held.COLUMNS,
            "rms_norm_eps, the input norm's weight, the projections to queries and their norm",
            replicated=False,
        )
        for engine, trainer in (("q_b_proj", "linear_q_up_proj"), ("q_proj", "linear_q_proj"))
    ),
    Operation(
        "attention", "self_attn.attn", "self_attention.core_attention", Held.COLUMNS,
        "rope_theta and rope_scaling, query and key norms, the attention backend and its precision",
        replicated=False,
    ),
    Operation(
        "attention out", "self_attn.o_proj", "self_attention.linear_proj", Held.TOKENS,
        "the output projection's weights and bias",
        replicated=False,
    ),
    Operation(
        "linear attention in", "linear_attn.in_proj_qkvz", "self_attention.in_proj_qkvz",
        Held.COLUMNS,
        "rms_norm_eps, the input norm's weight (1 is added to it), the weights of in_proj_qkvz",
        replicated=False,
    ),
    Operation(
        "linear attention out", "linear_attn.out_proj", "self_attention.out_proj", Held.TOKENS,
        "A_log, dt_bias, the convolution, the norm after it, the state of a request",
        replicated=False,
    ),
    Operation(
        "residual", "post_attention_layernorm", "pre_mlp_layernorm", Held.TOKENS,
        "the residual sum after attention",
        output=1, is_input=True,
    ),
    Operation(
        ROUTER, "mlp.gate", "mlp.router", Held.TOKENS,
        "the norm before the experts, the router's weights and its precision (moe_router_dtype)",
    ),
    Operation(
        "mlp up", "mlp.gate_up_proj", "mlp.linear_fc1", Held.GATE_UP,
        "rms_norm_eps, the second norm's weight, the gate and up weights",
        replicated=False,
    ),
    Operation(
        "mlp out", "mlp.down_proj", "mlp.linear_fc2", Held.TOKENS,
        "the activation function, the down projection's weights",
        replicated=False,
    ),
)  # fmt: skip
LOOK_AT = {operation.name: operation.look_at for operation in LAYER} | {
    EMBEDDING: "the embedding's weights, and whether one side scales them",
    FINAL_NORM: "the last layer's MLP, the final norm's weight, rms_norm_eps",
}


def layer_operation(layer: int, name: str) -> str:
    """Returns the name of an operation of a layer, which is counted from 0."""
    return f"layer {layer}: {name}"
