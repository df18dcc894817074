"""The experts of a layer as one grouped matrix product (megatron.moe_grouped_gemm).

Megatron's own local layer multiplies expert by expert. Here a parameter stacks the weights of all
local experts, and torch's grouped product multiplies all tokens with the weights of their experts
in one kernel (bf16, from Hopper on). The CPU, other precisions and other GPUs take the same
parameters expert by expert. Transformer Engine has its own grouped layer and does not use this.

Suffixes: T tokens, sorted by expert, E experts of this rank, I inputs and O outputs of a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor, nn

from megatron_async_rl.errors import ConfigError
from megatron_async_rl.trainer.model.fused import swiglu
from megatron_async_rl.trainer.model.recompute import SelectiveRecompute

_EXTRA_STATE = "_extra_state"
_ALIGNMENT = 8  # elements of bf16 in the 16 bytes at which the kernel's rows must begin


class GroupedExperts(MegatronModule):
    """Replaces Megatron's SequentialMLP; checkpoints of either load into the other."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: Any,
        **unused: Any,
    ) -> None:
        super().__init__(config)
        if config.moe_apply_probs_on_input:
            raise ConfigError(
                "megatron.moe_apply_probs_on_input = True is not computed by grouped experts; set "
                "megatron.moe_grouped_gemm: false, or remove the key"
            )
        self._groups = pg_collection
        sizes = (num_local_experts, config, pg_collection.expt_tp.size())
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
        self.linear_fc1 = _StackedLinear(*sizes, size=(2 * ffn, hidden), split=0)
        self.linear_fc2 = _StackedLinear(*sizes, size=(hidden, ffn), split=1)

    def forward(
        self, tokens_TI: Tensor, tokens_per_expert: Tensor, probs_T: Tensor
    ) -> tuple[Tensor, None]:
        """Returns the experts' outputs, each weighted by its token's probability."""
        fc1, fc2 = self.linear_fc1.weight, self.linear_fc2.weight
        groups = TokenGroups.of(tokens_per_expert, use_kernel=has_kernel(tokens_TI, fc1))
        gate_up = grouped_linear(tokens_TI, fc1, groups)
        activated = swiglu(gate_up, probs_T)
        with SelectiveRecompute() as selective:  # gate_up is kept anyway, for the activation
            if len(activated):
                selective.recompute(activated, lambda: swiglu(gate_up, probs_T))
            return grouped_linear(activated, fc2, groups), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Returns the parameters under the names and in the shapes that SequentialMLP saves."""
        axis = len(sharded_offsets)
        ep, tp = self._groups.ep, self._groups.expt_tp
        experts = (axis, ep.rank(), ep.size())
        replica = (0, 0, self._groups.expt_dp.rank())

        def shard(key: str, data: Tensor, *offset: int) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                key,
                data,
                *sharded_offsets,
                experts,
                offset,
                replica_id=replica,
                prepend_axis_num=axis,
            )

        def build(key: str, data: Tensor, *unused: Any) -> list[ShardedTensor]:
            halves = (half.contiguous() for half in data.chunk(2, 1))  # gate, up
            return [
                shard(key, half, axis + 1, n * tp.size() + tp.rank(), 2 * tp.size())
                for n, half in enumerate(halves)
            ]

        fc1 = ShardedTensorFactory(
            f"{prefix}experts.linear_fc1.weight",
            self.linear_fc1.weight,
            build,
            lambda halves: torch.cat(halves, 1),
            replica_id=replica,
        )
        fc2 = shard(
            f"{prefix}experts.linear_fc2.weight",
            self.linear_fc2.weight,
            axis + 2,
            tp.rank(),
            tp.size(),
        )
        state = {f"{prefix}linear_fc1.weight": fc1, f"{prefix}linear_fc2.weight": fc2}
        # Empty objects that the layers of other experts expect; _StackedLinear ignores them.
        num_local = len(self.linear_fc1.weight)
        for expert in range(ep.rank() * num_local, (ep.rank() + 1) * num_local):
            offsets = (*sharded_offsets, (axis, expert, ep.size() * num_local))
            for linear in ("linear_fc1", "linear_fc2"):
                state[f"{prefix}{linear}.{_EXTRA_STATE}.{expert}"] = (
                    make_sharded_object_for_checkpoint(
                        None,
                        f"{prefix}experts.{linear}.{_EXTRA_STATE}",
                        offsets,
                        (0, tp.rank(), self._groups.expt_dp.rank()),
                    )
                )
        return state


class _StackedLinear(nn.Module):
    """Holds the weights [E, O, I] of one product of all experts; `split` is ETP's dimension."""

    def __init__(
        self,
        num_experts: int,
        config: TransformerConfig,
        tp: int,
        *,
        size: tuple[int, int],
        split: int,
    ) -> None:
        super().__init__()
        local = list(size)
        local[split] //= tp
        device = torch.cuda.current_device()
        weight = torch.empty(num_experts, *local, dtype=config.params_dtype, device=device)
        self.weight = nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, True, split + 1, 1)
        # The gradient is reduced over the ranks that hold the same experts. Megatron's own experts
        # use the group of the dense layers without expert parallelism, which is another one if
        # expert_tensor_parallel_size differs from tensor_model_parallel_size.
        self.weight.allreduce = False
        self.register_load_state_dict_pre_hook(_drop_extra_states)


def _drop_extra_states(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for key in [key for key in state if key.startswith(prefix + _EXTRA_STATE)]:
        del state[key]


@dataclass(frozen=True, slots=True)
class TokenGroups:
    """Which of the sorted tokens belong to which expert."""

    counts: list[int]
    """Tokens of each expert."""
    ends_E: Tensor | None
    """End of each expert's tokens, on their device; None: no kernel is used."""

    @classmethod
    def of(cls, tokens_per_expert: Tensor, use_kernel: bool) -> TokenGroups:
        counts = tokens_per_expert.tolist()  # Megatron's dispatchers have copied it to the CPU
        if not use_kernel:
            return cls(counts, None)
        # Pinned: the copy does not wait for the GPU.
        ends = torch.tensor(
            list(accumulate(counts)), dtype=torch.int32, pin_memory=torch.cuda.is_available()
        )
        return cls(counts, ends.to(torch.cuda.current_device(), non_blocking=True))

    def multiply(self, x_TI: Tensor, weight_EIO: Tensor) -> Tensor:
        """Returns [T, O]: each token times the weight of its expert."""
        if self.ends_E is not None:
            return F.grouped_mm(x_TI, weight_EIO, offs=self.ends_E)
        parts = zip(x_TI.split(self.counts), weight_EIO, strict=True)
        return torch.cat([x @ weight for x, weight in parts])

    def outer(self, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        """Returns [E, O, I]: for each expert the sum over its tokens of y x^T."""
        if self.ends_E is None:
            parts = zip(y_TO.split(self.counts), x_TI.split(self.counts), strict=True)
            return torch.stack([y.t() @ x for y, x in parts])
        sums_EOI = F.grouped_mm(y_TO.t(), x_TI, offs=self.ends_E)
        # Blackwell's kernel leaves them uninitialized (pytorch issue 172439).
        for expert, count in enumerate(self.counts):
            if not count:
                sums_EOI[expert].zero_()
        return sums_EOI


def has_kernel(x_TI: Tensor, weight_EOI: Tensor) -> bool:
    """Returns whether torch has a kernel for this grouped product; otherwise experts take turns."""
    if not x_TI.is_cuda or x_TI.dtype != torch.bfloat16 or not len(x_TI):
        return False
    aligned = all(size % _ALIGNMENT == 0 for size in weight_EOI.shape[1:])
    return aligned and torch.cuda.get_device_capability(x_TI.device) >= (9, 0)


def grouped_linear(x_TI: Tensor, weight_EOI: Tensor, groups: TokenGroups) -> Tensor:
    """Returns [T, O]: each token times the transposed weight of its expert."""
    return _GroupedLinear.apply(x_TI, weight_EOI, groups)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_EOI: Tensor, groups: TokenGroups) -> Tensor:
        ctx.save_for_backward(x_TI, weight_EOI)
        ctx.groups = groups
        return groups.multiply(x_TI, weight_EOI.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_EOI = ctx.saved_tensors
        dy_TO = dy_TO.contiguous()
        dx_TI = ctx.groups.multiply(dy_TO, weight_EOI) if ctx.needs_input_grad[0] else None
        return dx_TI, ctx.groups.outer(dy_TO, x_TI), None
