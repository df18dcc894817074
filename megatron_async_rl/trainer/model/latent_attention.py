"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) of Megatron's local layer.

Megatron's own class splits the projections to latent vectors over tensor-parallel ranks, which
makes the gradient of the shared key wrong: each rank has only that of its own heads. Here every
rank has the whole projections, as with Transformer Engine, and with its parameter names. RoPE is
computed in float32.

Suffixes: T tokens of the pack that this rank holds, S those of this rank's part with sequence
parallelism, H heads, D size of a head, R elements of a head that RoPE rotates, F = R / 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttentionSubmodules,
    MultiLatentAttention,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn

from megatron_async_rl.errors import ConfigError
from megatron_async_rl.trainer.model.fused import rotate
from megatron_async_rl.trainer.model.sequences import PackedSequences


class PackedLatentAttention(MultiLatentAttention):
    """Megatron's layer over packed sequences; its core attention is PackedAttention."""

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", **kwargs)
        if self.recompute_up_proj:
            raise ConfigError(
                "megatron.recompute_modules = [mla_up_proj] is not computed by the layers without "
                "Transformer Engine; remove mla_up_proj from it"
            )
        hidden, rank = config.hidden_size, config.q_lora_rank
        queries = config.num_attention_heads * self.q_head_dim
        if rank is None:
            self.linear_q_proj = self._split_linear(ColumnParallelLinear, hidden, queries)
        else:
            self.linear_q_down_proj = WholeLinear(config, rank)
            self.linear_q_up_proj = self._split_linear(submodules.linear_q_up_proj, rank, queries)
        latent, up = config.kv_lora_rank, submodules.linear_kv_up_proj
        self.linear_kv_down_proj = WholeLinear(config, latent + config.qk_pos_emb_head_dim)
        key_and_value = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
        self.linear_kv_up_proj = self._split_linear(up, latent, key_and_value)

    def _split_linear(self, cls: type, inputs: int, outputs: int) -> ColumnParallelLinear:
        """Builds a linear layer with outputs split over the tensor-parallel ranks."""
        return cls(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.tp_group,
        )

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: None = None,
        position_ids: None = None,
        packed_seq_params: PackedSequences | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns query and key [T, 1, H, D], rotated, and value [T, 1, H, its size of a head].

        And the latent vectors, which Megatron wants too. `hidden_states`: [S, 1, hidden].
        """
        assert packed_seq_params is not None, "the trainer packs every micro-batch"
        config, heads = self.config, self.num_attention_heads_per_partition
        queries, up = hidden_states, "linear_q_proj"
        if config.q_lora_rank is not None:
            (queries, _), up = self.linear_q_down_proj(hidden_states), "linear_q_up_proj"
        query, _ = getattr(self, up)(queries)
        down, _ = self.linear_kv_down_proj(hidden_states)
        latent, shared_key = down.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], -1)
        key_and_value, _ = self.linear_kv_up_proj(latent.contiguous())
        if config.sequence_parallel:  # backward adds the gradients of all ranks' heads
            shared_key = gather_from_sequence_parallel_region(shared_key, group=self.tp_group)
        sizes = [config.qk_head_dim, config.v_head_dim]
        key, value = key_and_value.unflatten(-1, (heads, -1)).split(sizes, -1)
        sizes = [config.qk_head_dim, config.qk_pos_emb_head_dim]
        query, rotated = query.unflatten(-1, (heads, -1)).split(sizes, -1)
        angles = self._angles(packed_seq_params)
        rotated, shared_key = rotate(_halves(rotated[:, 0]), _halves(shared_key), *angles)
        query = torch.cat([query, rotated[:, None]], -1)
        shared_key = shared_key[:, None].expand(-1, -1, heads, -1)
        return query, torch.cat([key, shared_key], -1), value, queries, latent

    def _angles(self, packed: PackedSequences) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines [T, F], which YaRN scales."""
        table, scale = self.rotary_pos_emb.get_emb(packed.max_seqlen_q), 1.0
        if isinstance(table, tuple):  # YaRN's
            table, scale = table
        half = table.size(-1) // 2  # the second half of the angles repeats the first
        angles_TF = table[:, 0, 0, :half][packed.positions_T]
        return angles_TF.cos() * scale, angles_TF.sin() * scale


def _halves(x: Tensor) -> Tensor:
    """Returns the pairs (a, b) of the last dimension as halves: all a, then all b."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


class WholeLinear(nn.Module):
    """A linear layer that every tensor-parallel rank has whole, of its part of the tokens."""

    def __init__(self, config: MLATransformerConfig, size: int) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        weight = torch.empty(size, config.hidden_size, dtype=config.params_dtype, device=device)
        self.weight = nn.Parameter(weight)
        # finalize_model_grads adds up the gradients of marked parameters over the ranks
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None
