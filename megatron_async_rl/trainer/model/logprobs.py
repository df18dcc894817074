"""Logprobs of given tokens and entropy, from logits split over tensor-parallel ranks by vocabulary.

Megatron's vocab_parallel_cross_entropy makes a float32 copy of all logits, overwrites them in
place, and has no temperature, no entropy and no padded vocabulary rows. Here the work is done in
chunks of at most CHUNK_ELEMENTS logits, and backward recomputes the softmax. Each rank reduces its
part of the vocabulary to four numbers per token, which one collective gathers.

Memory besides the logits: [R, 4, T] in float32, and temporaries of a chunk, each CHUNK_ELEMENTS * 4
bytes (512 MiB) on the CPU; the fused kernels on a GPU have none. A float32 copy of 32768 x 151936
logits would take 19.9 GB.

Suffixes: T tokens, C tokens of a chunk, V this rank's part of the vocabulary, R ranks, 4 the
numbers of `_reduce`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_async_rl.trainer.model.fused import gpu_compiled

CHUNK_ELEMENTS = 1 << 27
_EMPTY = -1e30  # maximum over no logits; finite, so that 0 * _EMPTY is 0


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
    """Returns (logprob of each target [T], entropy [T]) of softmax(logits / temperature).

    In float32, differentiable; collective over `group`, the tensor-parallel group, in which rank r
    has columns r * V to (r + 1) * V.

    vocab_size: without padding; columns beyond it have no probability. entropy=False: returns zeros
    for it at no cost. overwrite_logits: backward writes the gradient over the logits, which saves
    their size in memory; they must not be used again.
    """
    return _TokenLogprobs.apply(
        logits_TV, targets_T, vocab_size, temperature, group, entropy, overwrite_logits
    )


def _chunks(total: int, columns: int) -> Iterator[slice]:
    """Returns slices of rows, of at most CHUNK_ELEMENTS elements but at least one row each."""
    rows = max(1, CHUNK_ELEMENTS // max(1, columns))
    return (slice(start, start + rows) for start in range(0, total, rows))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Returns logits / temperature in float32 (float64 stays)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1.0 else wide / temperature


@gpu_compiled
def _reduce(logits_CV: Tensor, target_C: Tensor, temperature: float, entropy: bool) -> Tensor:
    """Returns [4, C]: max x | sum e | sum e * (x - max), or 0 | x of the target.

    Over the columns x of this rank, with e = exp(x - max x).
    """
    x = _scaled(logits_CV, temperature)
    top = x.amax(1)
    shifted = x - top[:, None]
    e = shifted.exp()
    weighted = (e * shifted).sum(1) if entropy else torch.zeros_like(top)
    columns_C = target_C.clamp(0, logits_CV.size(1) - 1)
    target = _scaled(logits_CV.gather(1, columns_C[:, None])[:, 0], temperature)
    return torch.stack([top, e.sum(1), weighted, target])


@gpu_compiled
def _write_gradient(
    logits_CV: Tensor,
    target_C: Tensor,
    log_sum_C: Tensor,
    entropy_C: Tensor,
    d_logprobs_C: Tensor | None,
    d_entropy_C: Tensor | None,
    temperature: float,
) -> None:
    """Writes the gradient over the logits, with p the softmax.

    d logprob / dx = [x is the target] - p,  d entropy / dx = -p (log p + entropy)
    """
    log_p = _scaled(logits_CV, temperature) - log_sum_C[:, None]
    p = log_p.exp()
    grad = torch.zeros_like(p)
    if d_logprobs_C is not None:
        columns = torch.arange(p.size(1), device=p.device)
        grad = ((columns == target_C[:, None]).to(p.dtype) - p) * d_logprobs_C[:, None]
    if d_entropy_C is not None:
        grad = grad - p * (log_p + entropy_C[:, None]) * d_entropy_C[:, None]
    logits_CV.copy_(grad / temperature)


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
        local_T = targets_T - first  # column of the target on this rank
        here_T = (local_T >= 0) & (local_T < valid)

        total = logits_TV.size(0)
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        stats_4T = logits_TV.new_zeros(4, total, dtype=wide)
        stats_4T[0] = _EMPTY
        for rows in _chunks(total, valid) if valid else ():
            chunk = logits_TV[rows, :valid]
            stats_4T[:, rows] = _reduce(chunk, local_T[rows], temperature, entropy)
        stats_4T[3] = torch.where(here_T, stats_4T[3], 0.0)

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

        ctx.save_for_backward(logits_TV, local_T, log_sum_T, entropy_T)
        ctx.valid, ctx.temperature, ctx.overwrite = valid, temperature, overwrite_logits
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(
        ctx: Any, d_logprobs_T: Tensor | None, d_entropy_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits_TV, local_T, log_sum_T, entropy_T = ctx.saved_tensors
        grad_TV = logits_TV.detach() if ctx.overwrite else logits_TV.clone()
        for rows in _chunks(len(local_T), ctx.valid) if ctx.valid else ():
            _write_gradient(
                grad_TV[rows, : ctx.valid],
                local_T[rows],
                log_sum_T[rows],
                entropy_T[rows],
                None if d_logprobs_T is None else d_logprobs_T[rows],
                None if d_entropy_T is None else d_entropy_T[rows],
                ctx.temperature,
            )
        grad_TV[:, ctx.valid :] = 0
        return grad_TV, None, None, None, None, None, None
