"""Maps the tokens of a packed micro-batch to its samples, for sums over whole samples.

Suffixes: T tokens of the micro-batch that this rank holds, N samples in it, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SampleIndex:
    """The sample that each token of the micro-batch belongs to."""

    sample_T: Tensor  # int64, in [0, num_samples)
    num_samples: int
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums
    """Sums over the context-parallel ranks (which hold the samples' other tokens),
    differentiably."""

    def sums(self, x_TC: Tensor) -> Tensor:
        """Returns the sums over each sample's tokens [N, C], over all ranks that hold them."""
        return self.reduce(
            x_TC.new_zeros(self.num_samples, *x_TC.shape[1:]).index_add(0, self.sample_T, x_TC)
        )

    def means(self, x_T: Tensor, mask_T: Tensor) -> Tensor:
        """Returns at each token the mean of x over its sample's masked tokens [T], 0 if none.

        Differentiable.
        """
        sums_N, counts_N = self.sums(
            torch.stack([torch.where(mask_T, x_T, 0.0), mask_T.to(x_T.dtype)], 1)
        ).unbind(1)
        return (sums_N / counts_N.clamp(min=1))[self.sample_T]
