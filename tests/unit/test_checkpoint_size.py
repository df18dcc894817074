"""The size of a checkpoint, for the check of the disk before it is written."""

from __future__ import annotations

import torch

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

from megatron_async_rl.trainer.checkpoint.checkpoint import elements_share


def test_experts_that_ranks_share_out_are_counted_once_each() -> None:
    """8 data-parallel ranks hold the same 10 elements, and each pair of them 40 of 160."""
    dense, experts = (torch.nn.Parameter(torch.zeros(size)) for size in (10, 40))
    experts.allreduce = False
    assert 8 * elements_share([dense, experts], replicas=8, expert_replicas=2) == 10 + 160
