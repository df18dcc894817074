"""The transformer layer: Transformer Engine's where it can be imported on a GPU, else megatron.core's local one.

The local one carries Transformer Engine's parameter names (linear_qkv.layer_norm_weight), so a checkpoint and the
tables of weights/mapping.py are the same with either.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_async_rl.errors import ConfigError
from megatron_async_rl.trainer.model.attention import PackedAttention, PackedSequences
from megatron_async_rl.trainer.model.fused import rms_norm, swiglu
from megatron_async_rl.trainer.model.overlap import (
    OverlappedRowParallelLinear,
    gather_linear,
    overlaps,
)
from megatron_async_rl.trainer.model.recompute import SelectiveRecompute


def has_transformer_engine() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def block_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules | Any:
    experts = config.num_moe_experts
    if has_transformer_engine():
        if config.tp_comm_overlap:
            raise ConfigError(
                "megatron.tp_comm_overlap = True: Transformer Engine's layers need buffers for it that are not set up here; "
                "remove the key, or train without Transformer Engine"
            )
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, qk_layernorm=config.qk_layernorm
        )
    layer = get_gpt_layer_local_spec(
        num_experts=experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    parts = layer.submodules
    parts.input_layernorm = IdentityOp
    parts.pre_mlp_layernorm = (
        RMSNorm if experts else IdentityOp
    )  # the router needs the normed tokens too
    attention = parts.self_attention.submodules
    attention.linear_qkv, attention.core_attention = NormedColumnParallelLinear, PackedAttention
    attention.linear_proj = OverlappedRowParallelLinear
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if not experts:
        mlp = parts.mlp
        if isinstance(mlp, partial):  # megatron-core 0.19
            dense = mlp.keywords["submodules"]
            parts.mlp = partial(SwiGLUMLP.as_mlp_submodule, **mlp.keywords)
        else:
            dense = mlp.submodules
            parts.mlp = ModuleSpec(SwiGLUMLP, submodules=dense)
            logging.getLogger(transformer_layer.__name__).addFilter(_not_about_mlp)
        dense.linear_fc1, dense.linear_fc2 = NormedColumnParallelLinear, OverlappedRowParallelLinear
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _not_about_mlp(record: logging.LogRecord) -> bool:
    """megatron-core 0.16 warns in every layer that it builds an MLP class other than its own with default arguments."""
    return "Unknown MLP type" not in record.getMessage()


def _norm_weight(config: TransformerConfig, size: int) -> nn.Parameter:
    weight = nn.Parameter(
        torch.ones(size, dtype=config.params_dtype, device=torch.cuda.current_device())
    )
    # Under sequence parallelism a rank normalises its part of the tokens only: finalize_model_grads then sums the
    # weight's gradients over TP, for parameters marked so. Megatron's own local norm does not mark its weight.
    weight.sequence_parallel = config.sequence_parallel
    return weight


class RMSNorm(nn.Module):
    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_weight(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # Of its own: as a view, key and what comes with it would keep the whole product that they are cut from.
        x = x.contiguous()
        y = rms_norm(x, self.weight, self.eps)
        y.made_again = partial(_norm_rows, x.detach(), self.weight, self.eps)  # for PackedAttention
        return y


def _norm_rows(x: Tensor, weight: Tensor, eps: float, first: int, end: int) -> Tensor:
    return rms_norm(x[first:end], weight, eps)


class NormedColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """RMSNorm and the linear layer after it as one module, for Transformer Engine's parameter names."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = _norm_weight(config, input_size)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        normed = rms_norm(x, self.layer_norm_weight, self.eps)
        with SelectiveRecompute() as remake:  # x is kept anyway, for the norm
            remake.instead(normed, lambda: rms_norm(x, self.layer_norm_weight, self.eps))
            return super().forward(normed, *args, **kwargs)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not overlaps(self.config) or self.explicit_expert_comm:
            return super()._forward_impl(input, weight, *args, **kwargs)
        y = gather_linear(input, weight, self.tp_group)
        return y if kwargs["bias"] is None else y + kwargs["bias"]


class SwiGLUMLP(MLP):
    """Megatron's dense MLP for a gated SiLU without biases."""

    def forward(
        self, hidden_states: Tensor, *unused: Any, **also_unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        gate_up, _ = self.linear_fc1(hidden_states)
        activated = swiglu(gate_up)
        with SelectiveRecompute() as remake:  # gate_up is kept anyway, for the activation
            remake.instead(activated, lambda: swiglu(gate_up))
            return self.linear_fc2(activated)


class PackedRotaryEmbedding(RotaryEmbedding):
    """Rotary angles gathered once per micro-batch by each token's position in its own sequence.

    Megatron's way with packed sequences cuts and concatenates them per sequence, twice per layer, and waits for the GPU
    to learn their lengths. GPTModel passes what get_rotary_seq_len returns on to forward: we pass the sequences. The
    angles travel with them, and PackedAttention rotates query and key; Megatron, told of none, does not.
    """

    def get_rotary_seq_len(
        self, context: Any, block: Any, x: Any, config: Any, packed: PackedSequences, **unused: Any
    ) -> Any:
        return packed

    def forward(self, packed: PackedSequences, **unused: Any) -> None:
        half = self.inv_freq.numel()  # the second half of the angles repeats the first
        angles_TF = self.get_emb(packed.max_seqlen_q)[:, 0, 0, :half][packed.positions_T]
        packed.rotary_cos_TF, packed.rotary_sin_TF = angles_TF.cos(), angles_TF.sin()
