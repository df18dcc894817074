"""The trainer's part of the mismatch probe: its logprobs of the tokens that the engine scores too.

They are those of the weights at the start of the step, which forward passes of the step compute
anyway. controller/monitoring/mismatch.py chooses the tokens and compares.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_async_rl.protocol.types import PROBE_TOKENS
from megatron_async_rl.trainer.data.microbatch import Microbatch


class Probe:
    """Collects the logprobs of one step; one per rank."""

    def __init__(self, num_samples: int, device: torch.device) -> None:
        size = num_samples * PROBE_TOKENS
        self._sums = torch.zeros(2, size, dtype=torch.float64, device=device)  # logprobs, counts

    def add(self, microbatch: Microbatch, logprobs_T: Tensor) -> None:
        """Adds the tokens of a micro-batch, with logprobs of the current policy."""
        if microbatch.probe_T is None or microbatch.proximal_missing:
            return
        if microbatch.proximal_T is not None:
            logprobs_T = microbatch.proximal_T
        chosen_T = (microbatch.probe_T > 0) & microbatch.mask_T
        values = logprobs_T.detach()[chosen_T].double()
        both = torch.stack([values, torch.ones_like(values)])
        self._sums.index_add_(1, microbatch.probe_T[chosen_T].long() - 1, both)

    def logprobs(self) -> np.ndarray:
        """Returns [num_samples * PROBE_TOKENS] float32, NaN where unknown; collective."""
        if self._sums.numel():
            dist.all_reduce(self._sums)  # ranks that hold the same token add equal values
        sums, counts = self._sums.cpu().numpy()
        with np.errstate(invalid="ignore"):
            return (sums / np.where(counts, counts, np.nan)).astype(np.float32)
