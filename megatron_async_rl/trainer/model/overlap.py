"""Linear layers that overlap tensor-parallel communication and matrix products (tp_comm_overlap).

With sequence parallelism a layer's input is gathered over the ranks, or its output is reduced and
scattered. Megatron's local layers hide this only in backward, where two products follow each other.
Here torch's symmetric-memory operators split the product by ranks, and a copy engine moves one part
over NVLink while another is computed. Transformer Engine's own overlap is not supported.

Suffixes: T tokens, S tokens of one rank (T / ranks), I inputs and O outputs of this rank's part of
the layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory
from megatron.core.tensor_parallel import RowParallelLinear
from torch import Tensor


def gather_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the input of all ranks [S, 1, I each] times this rank's weight: [T, 1, O]."""
    return _GatherLinear.apply(x.flatten(0, 1), weight, group)[:, None]


class OverlappedRowParallelLinear(RowParallelLinear):
    """Megatron's layer; with tp_comm_overlap its product and reduce-scatter overlap."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if not overlaps(self.config) or self.bias is not None or self.explicit_expert_comm:
            return super().forward(input_)
        return _LinearScatter.apply(input_.flatten(0, 1), self.weight, self.tp_group)[:, None], None


def overlaps(config: Any) -> bool:
    """Returns whether communication overlaps with this transformer config."""
    return config.tp_comm_overlap and config.sequence_parallel and torch.cuda.is_available()


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_OI: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x_SI, weight_OI)
        ctx.group = group
        _, [y_TO] = torch.ops.symm_mem.fused_all_gather_matmul(
            x_SI, [weight_OI.t()], gather_dim=0, group_name=group.group_name, return_A=False
        )
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        # The gather overlaps the product of dx, and the reduce-scatter that of dweight.
        x_SI, weight_OI = ctx.saved_tensors
        x_TI = x_SI.new_empty(dy_TO.size(0), x_SI.size(1))
        gathering = dist.all_gather_into_tensor(x_TI, x_SI, group=ctx.group, async_op=True)
        dx_TI = dy_TO @ weight_OI
        gathering.wait()
        dx_SI = torch.empty_like(x_SI)
        scattering = dist.reduce_scatter_tensor(dx_SI, dx_TI, group=ctx.group, async_op=True)
        dweight_OI = dy_TO.t() @ x_TI
        scattering.wait()
        return dx_SI, dweight_OI, None


class _LinearScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.group = group
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(
            x_TI, weight_OI.t(), "sum", scatter_dim=0, group_name=group.group_name
        )

    @staticmethod
    def backward(ctx: Any, dy_SO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        dy_TO, [dx_TI] = torch.ops.symm_mem.fused_all_gather_matmul(
            dy_SO.contiguous(), [weight_OI], gather_dim=0, group_name=ctx.group.group_name
        )
        return dx_TI, dy_TO.t() @ x_TI, None
