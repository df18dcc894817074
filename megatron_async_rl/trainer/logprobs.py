"""Logprobs of given tokens, and entropy, from logits whose vocabulary is cut over tensor-parallel ranks.

Megatron's vocab_parallel_cross_entropy makes a float32 copy of all logits, overwrites them in place, and knows neither
temperature nor entropy nor padded vocabulary rows. Here float32 exists for CHUNK_TOKENS tokens at a time; backward
recomputes the softmax from the logits. Each rank reduces its part of the vocabulary to four numbers a token, and one
collective brings them together.

Suffixes: T tokens, V this rank's part of the vocabulary, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = 1024
_EMPTY = -1e30  # the maximum of no logits; finite, so that 0 * it is 0


def token_logprobs(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    entropy: bool = True,
    overwrite_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """(logprob of each target [T], entropy [T]) of softmax(logits / temperature), in float32 and differentiable.

    vocab_size: the true one; rows beyond it are padding and have no probability. group: the tensor-parallel group;
    rank r has columns r*V to (r+1)*V. entropy=False: the second is zeros, and costs nothing. overwrite_logits: backward
    writes the gradient over the logits, saving their size in memory; they must not be used again.
    """
    return _TokenLogprobs.apply(logits_TV, targets_T, vocab_size, temperature, group, entropy, overwrite_logits)


def _wide(logits: Tensor, temperature: float) -> Tensor:
    """A scaled copy in float32 (or float64 where they are)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        targets_T: Tensor,
        vocab_size: int,
        temperature: float,
        group: dist.ProcessGroup | None,
        entropy: bool,
        overwrite_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        rank, ranks = (group.rank(), group.size()) if group is not None else (0, 1)
        first = rank * logits_TV.size(1)
        valid = max(0, min(logits_TV.size(1), vocab_size - first))  # columns that are not padding
        local_T = targets_T - first  # the target's column here
        here_T = (local_T >= 0) & (local_T < valid)

        total = logits_TV.size(0)
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        # Per token, over this rank's columns x: max x | sum e | sum e * (x - max) | target's x, with e = exp(x - max).
        stats_4T = logits_TV.new_zeros(4, total, dtype=wide)
        stats_4T[0] = _EMPTY
        for start in range(0, total if valid else 0, CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            x = _wide(logits_TV[rows, :valid], temperature)
            target = x.gather(1, local_T[rows].clamp(0, valid - 1)[:, None])[:, 0]
            stats_4T[3, rows] = torch.where(here_T[rows], target, 0.0)
            stats_4T[0, rows] = top = x.amax(1)
            x -= top[:, None]
            e = x.exp()
            stats_4T[1, rows] = e.sum(1)
            if entropy:
                stats_4T[2, rows] = e.mul_(x).sum(1)

        stats_R4T = stats_4T[None]
        if ranks > 1:
            stats_R4T = stats_4T.new_empty(ranks, 4, total)
            dist.all_gather_into_tensor(stats_R4T.view(-1), stats_4T.view(-1), group=group)
        max_T = stats_R4T[:, 0].amax(0)
        shift_RT = stats_R4T[:, 0] - max_T
        scale_RT = shift_RT.exp()
        sum_T = (stats_R4T[:, 1] * scale_RT).sum(0)
        log_sum_T = sum_T.log() + max_T
        logprobs_T = stats_R4T[:, 3].sum(0) - log_sum_T
        if entropy:
            weighted_T = (scale_RT * (stats_R4T[:, 2] + shift_RT * stats_R4T[:, 1])).sum(0)
            entropy_T = sum_T.log() - weighted_T / sum_T
        else:
            entropy_T = torch.zeros_like(logprobs_T)

        ctx.save_for_backward(logits_TV, local_T, here_T, log_sum_T, entropy_T)
        ctx.valid, ctx.temperature, ctx.overwrite = valid, temperature, overwrite_logits
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, d_logprobs_T: Tensor | None, d_entropy_T: Tensor | None) -> tuple[Tensor | None, ...]:
        """With p the softmax: d logprob / d x = [target] - p;  d entropy / d x = -p * (log p + entropy)."""
        logits_TV, local_T, here_T, log_sum_T, entropy_T = ctx.saved_tensors
        grad_TV = logits_TV.detach() if ctx.overwrite else torch.empty_like(logits_TV)
        for start in range(0, logits_TV.size(0), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            log_p = _wide(logits_TV[rows, : ctx.valid], ctx.temperature) - log_sum_T[rows, None]
            p = log_p.exp()
            grad = torch.zeros_like(p)
            if d_logprobs_T is not None:
                grad.addcmul_(p, d_logprobs_T[rows, None], value=-1)
                if ctx.valid:
                    at_target = torch.where(here_T[rows], d_logprobs_T[rows], 0.0)
                    grad.scatter_add_(1, local_T[rows].clamp(0, ctx.valid - 1)[:, None], at_target[:, None])
            if d_entropy_T is not None:
                grad.addcmul_(p, (log_p + entropy_T[rows, None]) * d_entropy_T[rows, None], value=-1)
            grad_TV[rows, : ctx.valid] = (grad / ctx.temperature).to(grad_TV.dtype)
        grad_TV[:, ctx.valid :] = 0
        return grad_TV, None, None, None, None, None, None
