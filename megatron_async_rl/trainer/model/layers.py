"""The transformer layer: Transformer Engine's if installed on a GPU host, else Megatron's local
one.

The local layer has Transformer Engine's parameter names (linear_qkv.layer_norm_weight), so
checkpoints and the tables of model/families.py are the same with either.
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
    get_gpt_decoder_block_spec,
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
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from megatron_async_rl.errors import ConfigError
from megatron_async_rl.trainer.model.attention import PackedAttention
from megatron_async_rl.trainer.model.experts import GroupedExperts
from megatron_async_rl.trainer.model.fused import rms_norm, swiglu
from megatron_async_rl.trainer.model.gated_delta_net import GatedDeltaNet
from megatron_async_rl.trainer.model.latent_attention import PackedLatentAttention
from megatron_async_rl.trainer.model.overlap import (
    OverlappedRowParallelLinear,
    gather_linear,
    overlaps,
)
from megatron_async_rl.trainer.model.recompute import SelectiveRecompute
from megatron_async_rl.trainer.model.sequences import PackedSequences


def has_transformer_engine() -> bool:
    """Returns whether Transformer Engine's layers are used."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def block_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules | Any:
    """Returns Megatron's specification of the decoder layers; raises ConfigError."""
    if has_transformer_engine():
        if config.linear_attention_freq:
            raise ConfigError(
                "model.path has linear attention, which was not tried with Transformer Engine's "
                "layers; uninstall transformer-engine"
            )
        if config.tp_comm_overlap:
            raise ConfigError(
                "megatron.tp_comm_overlap = True needs buffers that are not set up for "
                "Transformer Engine's layers; remove the key, or uninstall transformer-engine"
            )
        if isinstance(config.moe_layer_freq, list):
            return get_gpt_decoder_block_spec(config, True, vp_stage=vp_stage)
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
        )
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    specs = [_layer_spec(config, layer) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _is_linear(config: TransformerConfig, layer: int) -> bool:
    frequency = config.linear_attention_freq
    return isinstance(frequency, int) and (layer + 1) % frequency != 0


def _num_experts(config: TransformerConfig, layer: int) -> int | None:
    frequency = config.moe_layer_freq
    is_dense = isinstance(frequency, list) and not frequency[layer]
    return None if is_dense else config.num_moe_experts


def _layer_spec(config: TransformerConfig, number: int) -> ModuleSpec:
    """Returns the specification of the layer with this global number."""
    experts = _num_experts(config, number)
    layer = get_gpt_layer_local_spec(
        num_experts=experts,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
        multi_latent_attention=config.multi_latent_attention,
    )
    parts = layer.submodules
    # Experts: the router needs the normed tokens too. So do queries and latent vectors.
    parts.input_layernorm = RMSNorm if config.multi_latent_attention else IdentityOp
    parts.pre_mlp_layernorm = RMSNorm if experts else IdentityOp
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    attention.linear_proj = OverlappedRowParallelLinear
    if config.multi_latent_attention:
        parts.self_attention.module = PackedLatentAttention
        attention.linear_q_up_proj = attention.linear_kv_up_proj = NormedColumnParallelLinear
    else:
        attention.linear_qkv = NormedColumnParallelLinear
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if _is_linear(config, number):
        parts.input_layernorm, parts.self_attention = RMSNorm, ModuleSpec(GatedDeltaNet)
    mlp = parts.mlp
    is_partial = isinstance(mlp, partial)  # megatron-core 0.19
    submodules = mlp.keywords["submodules"] if is_partial else mlp.submodules
    if not experts:
        if is_partial:
            parts.mlp = partial(SwiGLUMLP.as_mlp_submodule, **mlp.keywords)
        else:
            parts.mlp = ModuleSpec(SwiGLUMLP, submodules=submodules)
            logging.getLogger(transformer_layer.__name__).addFilter(_is_no_mlp_warning)
        submodules.linear_fc1 = NormedColumnParallelLinear
        submodules.linear_fc2 = OverlappedRowParallelLinear
    elif config.moe_grouped_gemm:
        submodules.experts = GroupedExperts
    return layer


def _is_no_mlp_warning(record: logging.LogRecord) -> bool:
    """Drops megatron-core 0.16's warning, in every layer, about an MLP class of another package."""
    return "Unknown MLP type" not in record.getMessage()


def _norm_weight(config: TransformerConfig, size: int) -> nn.Parameter:
    initial = 0.0 if config.layernorm_zero_centered_gamma else 1.0
    weight = nn.Parameter(
        torch.full((size,), initial, dtype=config.params_dtype, device=torch.cuda.current_device())
    )
    # With sequence parallelism a rank normalizes only its part of the tokens. finalize_model_grads
    # sums the gradients of marked parameters over TP; Megatron's local norm does not mark its own.
    weight.sequence_parallel = config.sequence_parallel
    return weight


class RMSNorm(nn.Module):
    """RMSNorm of query, key, and the tokens before a router."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any
    ) -> None:
        super().__init__()
        self.eps, self.is_zero_centered = eps, config.layernorm_zero_centered_gamma
        self.weight = _norm_weight(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # A copy: as a view it would keep the whole QKV product that it is a part of.
        x = x.contiguous()
        y = self._norm(x)
        # PackedAttention recomputes y from x in backward.
        detached = x.detach()
        y.recompute_fn = lambda first, end: self._norm(detached[first:end])
        return y

    def _norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, _gain(self.weight, self.is_zero_centered), self.eps)


def _gain(weight: Tensor, is_zero_centered: bool) -> Tensor:
    """Returns the factors of a norm: the weight, or with zero-centered gamma 1 + weight in float32,
    as which the engine computes it."""
    return (
        1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
        if is_zero_centered
        else weight
    )


class NormedColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """RMSNorm and the linear layer after it, with Transformer Engine's parameter names."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = _norm_weight(config, input_size)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        normed = self._norm(x)
        with SelectiveRecompute() as selective:  # x is kept anyway, for the norm
            selective.recompute(normed, lambda: self._norm(x))
            return super().forward(normed, *args, **kwargs)

    def _norm(self, x: Tensor) -> Tensor:
        gain = _gain(self.layer_norm_weight, self.config.layernorm_zero_centered_gamma)
        return rms_norm(x, gain, self.config.layernorm_epsilon)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not overlaps(self.config) or self.explicit_expert_comm:
            return super()._forward_impl(input, weight, *args, **kwargs)
        y = gather_linear(input, weight, self.tp_group)
        return y if kwargs["bias"] is None else y + kwargs["bias"]


class SwiGLUMLP(MLP):
    """Megatron's dense MLP with gated SiLU and no biases."""

    def forward(
        self, hidden_states: Tensor, *unused: Any, **also_unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        gate_up, _ = self.linear_fc1(hidden_states)
        activated = swiglu(gate_up)
        with SelectiveRecompute() as selective:  # gate_up is kept anyway, for the activation
            selective.recompute(activated, lambda: swiglu(gate_up))
            return self.linear_fc2(activated)


class PackedRotaryEmbedding(RotaryEmbedding):
    """Computes the rotary angles of each token once per micro-batch.

    Megatron slices and concatenates the angles per sequence, twice per layer, and waits for the GPU
    to learn the lengths. GPTModel passes the result of get_rotary_seq_len to forward: here that is
    the description of the pack, which then carries the angles to PackedAttention. forward returns
    None, so Megatron does not rotate.
    """

    def get_rotary_seq_len(
        self, context: Any, block: Any, x: Any, config: Any, packed: PackedSequences, **unused: Any
    ) -> Any:
        return packed

    def forward(self, packed: PackedSequences, **unused: Any) -> None:
        half = self.inv_freq.numel()  # the second half of the angles repeats the first
        angles_TF = self.get_emb(packed.max_seqlen_q)[:, 0, 0, :half][packed.positions_T]
        packed.rotary_cos_TF, packed.rotary_sin_TF = angles_TF.cos(), angles_TF.sin()
