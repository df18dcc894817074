"""Linear attention of Qwen3-Next over packed sequences: the gated delta net in plain torch.

Megatron-core's own layer needs the package flash-linear-attention, refuses packed sequences (0.16)
and context parallelism, and knows no CPU. Formulas: Yang et al., Gated Delta Networks, arXiv
2412.06464, in the chunked form of section 3.3. Sequences of similar length are padded into dense
batches; padding is on the right, where no token sees it.

With context parallelism every rank computes the whole sequences from the gathered projections.

Suffixes: T tokens of the pack that this rank holds, W tokens of the whole pack, N sequences of
length L, M chunks of S tokens, H key heads, J value heads, K and V sizes of a key and a value, C
channels of the convolution.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_async_rl.trainer.model.attention import move_rows
from megatron_async_rl.trainer.model.fused import rms_norm, swiglu
from megatron_async_rl.trainer.model.overlap import OverlappedRowParallelLinear
from megatron_async_rl.trainer.model.sequences import DenseBatch, PackedSequences

CHUNK = 64
"""Tokens of a chunk, between which the state is handed on."""
_SPLIT = ("conv_weight", "dt_bias", "A_log")  # by tensor parallelism, along their first dimension


class GatedDeltaNet(MegatronModule):
    """Takes the place of self-attention in a layer. A tensor-parallel rank has whole key heads.

    Rows of `in_proj_qkvz` and channels of the convolution are ordered by key head: its query, its
    key, its value heads, and (in the projection) their gates.
    """

    def __init__(self, config: TransformerConfig, *, pg_collection: Any, **unused: Any) -> None:
        super().__init__(config)
        self.tp_group = pg_collection.tp
        ranks, key_heads = self.tp_group.size(), config.linear_num_key_heads
        value_heads = config.linear_num_value_heads
        self.key_heads, self.repeats = key_heads // ranks, value_heads // key_heads
        self.key_size, self.value_size = config.linear_key_head_dim, config.linear_value_head_dim
        values = value_heads * self.value_size
        channels = 2 * key_heads * self.key_size + values
        options: dict[str, Any] = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "tp_group": self.tp_group,
        }
        hidden = config.hidden_size
        self.in_proj_qkvz = ColumnParallelLinear(
            hidden, channels + values, gather_output=False, **options
        )
        self.in_proj_ba = ColumnParallelLinear(
            hidden, 2 * value_heads, gather_output=False, **options
        )
        self.out_proj = OverlappedRowParallelLinear(
            values, hidden, input_is_parallel=True, skip_bias_add=True, **options
        )

        def parameter(*sizes: int) -> nn.Parameter:
            device = torch.cuda.current_device()
            return nn.Parameter(torch.ones(*sizes, dtype=config.params_dtype, device=device))

        self.conv_weight = parameter(channels // ranks, 1, config.linear_conv_kernel_dim)
        self.dt_bias = parameter(value_heads // ranks)
        self.A_log = parameter(value_heads // ranks)
        for name in _SPLIT:
            set_tensor_model_parallel_attributes(getattr(self, name), True, 0, 1)
        # Each rank's gradient is that of its own heads: finalize_model_grads sums over marked ones.
        self.norm_weight = parameter(self.value_size)
        self.norm_weight.sequence_parallel = config.sequence_parallel

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSequences | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns [T, 1, hidden] and no bias; with sequence parallelism this rank's part of T."""
        assert packed_seq_params is not None, "the trainer packs every micro-batch"
        packed, heads = packed_seq_params, self.key_heads
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        of_head = 2 * self.key_size + self.repeats * self.value_size
        qkv, gate = qkvz.view(len(qkvz), heads, -1).tensor_split([of_head], 2)
        gathered = packed.gather(torch.cat([qkv.flatten(1), ba[:, 0]], 1))
        qkv_WC, ba_W = gathered.split([heads * of_head, ba.size(-1)], 1)
        beta_WJ, alpha_WJ = (x.flatten(1) for x in ba_W.view(len(ba_W), heads, 2, -1).unbind(2))
        wide = torch.promote_types(qkv_WC.dtype, torch.float32)
        decay_WJ = -self.A_log.to(wide).exp() * F.softplus(alpha_WJ.to(wide) + self.dt_bias)
        out_WJV = self._attend(qkv_WC, decay_WJ, beta_WJ.to(wide).sigmoid(), packed)
        out = rms_norm(packed.shard(out_WJV), self.norm_weight, self.config.layernorm_epsilon)
        gated = swiglu(torch.cat([gate.reshape(out.shape), out], -1))
        return self.out_proj(gated.view(len(qkvz), 1, -1))

    def _attend(
        self, qkv_WC: Tensor, decay_WJ: Tensor, beta_WJ: Tensor, packed: PackedSequences
    ) -> Tensor:
        """Returns [W, J, V]; `decay_WJ` is the logarithm of the decay."""

        def attended(batch: DenseBatch) -> Tensor:
            """Returns [W, J, V], zero for tokens of other batches."""
            size = batch.num_sequences * batch.length
            padded = [
                move_rows(x, batch.tokens_K, batch.slots_K, size).view(
                    batch.num_sequences, batch.length, -1
                )
                for x in (qkv_WC, decay_WJ, beta_WJ)
            ]
            # Its intermediate results are many times larger than its inputs.
            out = checkpoint(
                self._convolve_and_attend, *padded, use_reentrant=False, preserve_rng_state=False
            )
            return move_rows(out.flatten(0, 1), batch.slots_K, batch.tokens_K, len(qkv_WC))

        return reduce(torch.add, map(attended, packed.whole_sequences))

    def _convolve_and_attend(self, qkv_NLC: Tensor, decay_NLJ: Tensor, beta_NLJ: Tensor) -> Tensor:
        num, length, _ = qkv_NLC.shape
        mixed_NLC = convolve(qkv_NLC, self.conv_weight[:, 0])
        of_head = mixed_NLC.view(num, length, self.key_heads, -1)
        query, key, value = of_head.split(
            [self.key_size, self.key_size, self.repeats * self.value_size], 3
        )
        value_NLJV = value.reshape(num, length, -1, self.value_size)
        return gated_delta_rule(query, key, value_NLJV, decay_NLJ, beta_NLJ)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Returns the checkpoint's description of the parameters; any other TP can load it."""
        own = {name: getattr(self, name) for name in _SPLIT}
        return super().sharded_state_dict(
            prefix, sharded_offsets, metadata
        ) | make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets)


def convolve(x_NLC: Tensor, weight_CW: Tensor) -> Tensor:
    """Returns SiLU of each channel's causal convolution, [N, L, C], in float32 or wider within.

    The engine too sums in float32 and rounds the result only.
    """
    wide = torch.promote_types(x_NLC.dtype, torch.float32)
    length, weights = x_NLC.size(1), weight_CW.to(wide).unbind(1)
    earlier = F.pad(x_NLC.to(wide), (0, 0, len(weights) - 1, 0))
    mixed = sum(earlier[:, i : i + length] * weight_C for i, weight_C in enumerate(weights))
    return F.silu(mixed).to(x_NLC.dtype)


def gated_delta_rule(
    query_NLHK: Tensor, key_NLHK: Tensor, value_NLJV: Tensor, decay_NLJ: Tensor, beta_NLJ: Tensor
) -> Tensor:
    """Returns the outputs o [N, L, J, V], in float32 or wider within.

    Of each value head, with q, k normalized to length 1 and S_0 = 0:
    S_t = exp(decay_t) S_(t-1) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,  o_t = S_t q_t / sqrt(K).
    Within a chunk the values that the updates write are the solution of a triangular system.
    """
    length, repeats = value_NLJV.size(1), value_NLJV.size(2) // key_NLHK.size(2)
    chunk = min(CHUNK, length)

    def chunked(x: Tensor) -> Tensor:
        """Returns [N, J, M, S, ...] of [N, L, J, ...]; the padding neither decays nor writes."""
        padding = -length % chunk
        x = F.pad(x, (0,) * (2 * x.dim() - 3) + (padding,)).transpose(1, 2)
        return x.unflatten(2, (-1, chunk))

    wide = decay_NLJ.dtype
    query, key = (
        chunked(_unit(x.to(wide)).repeat_interleave(repeats, 2)) for x in (query_NLHK, key_NLHK)
    )
    query = query * query.size(-1) ** -0.5
    value, total, beta = chunked(value_NLJV.to(wide)), chunked(decay_NLJ), chunked(beta_NLJ)
    total = total.cumsum(-1)  # decay since the start of the chunk
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=total.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    writes = key * beta[..., None]
    system = (writes @ key.mT * between).tril(-1)
    right = torch.cat([value * beta[..., None], writes * total.exp()[..., None]], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, from_state = solved.split([value.size(-1), key.size(-1)], -1)
    within = query @ key.mT * between
    reads = query * total.exp()[..., None]
    kept = (key * (total[..., -1:] - total).exp()[..., None]).mT
    state = value.new_zeros(*value.shape[:2], key.size(-1), value.size(-1))  # [N, J, K, V]
    outputs = []
    # unbind: backward of an index would fill a gradient of all chunks with zeros for each chunk
    chunks = (own, from_state, reads, within, kept, total[..., -1, None, None].exp())
    for own_m, from_state_m, reads_m, within_m, kept_m, decay_m in zip(
        *(x.unbind(2) for x in chunks), strict=True
    ):
        new = own_m - from_state_m @ state
        outputs.append(reads_m @ state + within_m @ new)
        state = state * decay_m + kept_m @ new
    out = torch.stack(outputs, 2).flatten(2, 3)[:, :, :length]
    return out.transpose(1, 2).to(value_NLJV.dtype)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
