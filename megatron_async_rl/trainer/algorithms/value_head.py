"""The critic's output layer (trainer/algorithms/critic.py)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class ValueHead(nn.Module):
    """Replaces GPTModel's output layer: maps hidden states [T, 1, hidden] to values [T, 1, 1].

    The values are float32. Every tensor-parallel rank holds all of it and computes the same.
    Initialized with zeros: all values are 0 at first, and the first advantages are those without a
    critic.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        device, dtype = torch.cuda.current_device(), config.params_dtype
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=dtype, device=device))

    def forward(self, hidden: Tensor, weight: None = None, **unused: Any) -> tuple[Tensor, None]:
        if self.sequence_parallel:  # the gradient is the same on all ranks: each keeps its part
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.float() @ self.weight.float().t(), None
