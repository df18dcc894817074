"""The critic's last layer (critic.py)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class ValueHead(nn.Module):
    """In the place of GPTModel's output layer: hidden states [T, 1, hidden] to values [T, 1, 1] in float32.

    Every tensor-parallel rank has the whole of it and computes the same. It begins as zeros: all values are 0, and the
    first advantages are those without a critic.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.weight = nn.Parameter(
            torch.zeros(
                1, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
            )
        )

    def forward(self, hidden: Tensor, weight: None = None, **unused: Any) -> tuple[Tensor, None]:
        if (
            self.sequence_parallel
        ):  # the gradient that comes back is the same on all ranks: each keeps its part
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.float() @ self.weight.float().t(), None
