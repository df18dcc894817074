"""Element-wise work between matrix products, fused into one kernel each on a GPU.

Memory traffic is the cost of this work. torch.compile builds the kernels at the first call; the CPU
runs the same functions without compilation. Arithmetic is in float32 or wider for every dtype.
Gradients are written by hand, which fixes the tensors kept for backward.

Suffixes: T rows (tokens), H heads, D size of a row (of a head), F = D / 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gpu_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function` for tensors on a GPU; its first argument is a tensor of rows.

    One kernel serves any number of rows; other sizes are compiled separately, because kernels with
    all sizes dynamic were 2 to 4 times slower on Hopper.
    """
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)  # beyond it fullgraph raises

    @functools.wraps(function)
    def call(first: Tensor, *rest: Any) -> Any:
        if not first.is_cuda:
            return function(first, *rest)
        # Detached: parameters and tensors that require a gradient would be compiled separately, and
        # the mark would stay on them.
        args = [x.detach() if isinstance(x, Tensor) else x for x in (first, *rest)]
        for x in args:
            if isinstance(x, Tensor) and x.size(0) == first.size(0):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(*args)

    return call


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    The result has the type of x; the weight may be in float32.
    """
    if x.is_cuda:
        return _RMSNorm.apply(x, weight, eps)
    if weight.dtype != x.dtype:
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """torch's kernels use a block per row: slow for the short rows of query and key norms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y_TD, scale_T = _norm_forward(x.reshape(-1, x.size(-1)), weight, eps)
        ctx.save_for_backward(x, weight, scale_T)
        return y_TD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale_T = ctx.saved_tensors
        size = x.size(-1)
        rows = (dy.reshape(-1, size), x.reshape(-1, size))
        dx_TD, dweight_D = _norm_backward(*rows, weight, scale_T)
        return dx_TD.view(x.shape), dweight_D, None


@gpu_compiled
def _norm_forward(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x_TD.float()
    scale_T = torch.rsqrt(wide.square().mean(1) + eps)
    return (wide * scale_T[:, None] * weight_D.float()).to(x_TD.dtype), scale_T


@gpu_compiled
def _norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, scale_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns (dx, dweight), with n = x * scale and g = dy * weight.

    dx = scale * (g - n * mean(g * n)),  dweight = sum over T of dy * n
    """
    n = x_TD.float() * scale_T[:, None]
    g = dy_TD.float() * weight_D.float()
    dx = scale_T[:, None] * (g - n * (g * n).mean(1, keepdim=True))
    return dx.to(x_TD.dtype), (dy_TD.float() * n).sum(0).to(weight_D.dtype)


def swiglu(x: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """Returns silu(gate) * up of the two halves (gate, up) of the last dimension.

    With weights, x is [T, D], and each row of the result is multiplied by its weight.
    """
    return _SwiGLU.apply(x, weight_T)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_T)
        rows = x.reshape(-1, x.size(-1))
        # not -1: experts without tokens have no elements
        return _swiglu_forward(rows, weight_T).view(*x.shape[:-1], x.size(-1) // 2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight_T = ctx.saved_tensors
        rows = (dy.contiguous().view(-1, dy.size(-1)), x.reshape(-1, x.size(-1)))
        dx_TD, dweight_T = _swiglu_backward(*rows, weight_T)
        return dx_TD.view(x.shape), dweight_T


@gpu_compiled
def _swiglu_forward(x_TD: Tensor, weight_T: Tensor | None) -> Tensor:
    gate, up = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)).chunk(2, 1)
    y = gate * gate.sigmoid() * up
    return (y if weight_T is None else y * weight_T[:, None]).to(x_TD.dtype)


@gpu_compiled
def _swiglu_backward(
    dy_TF: Tensor, x_TD: Tensor, weight_T: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns ((dgate, dup) as one tensor, dweight), with s = sigmoid(gate) and g = dy * weight.

    dgate = g * up * s * (1 + gate * (1 - s)),  dup = g * gate * s
    dweight = sum over F of dy * gate * s * up
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    (gate, up), dy = x_TD.to(wide).chunk(2, 1), dy_TF.to(wide)
    s, g = gate.sigmoid(), dy if weight_T is None else dy * weight_T[:, None]
    dx = torch.cat([g * up * s * (1 + gate * (1 - s)), g * gate * s], 1).to(x_TD.dtype)
    if weight_T is None:
        return dx, None
    return dx, (dy * gate * s * up).sum(1).to(weight_T.dtype)


def rotate(query: Tensor, key: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Applies the rotary position embedding to query [T, H, D] and key [T, G, D].

    The halves (a, b) of D become (a cos - b sin, b cos + a sin). Only the angles are kept for
    backward, which rotates the other way. With fewer than D / 2 angles, elements from 2 F on stay.
    """
    return _Rotate.apply(query, key, cos_TF, sin_TF)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos_TF: Tensor, sin_TF: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_TF, sin_TF)
        return _rotate(query, key, cos_TF, sin_TF)

    @staticmethod
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Tensor | None, ...]:
        cos_TF, sin_TF = ctx.saved_tensors
        return *_rotate(dquery, dkey, cos_TF, -sin_TF), None, None


@gpu_compiled
def _rotate(query: Tensor, key: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(query, cos_TF, sin_TF), _rotated(key, cos_TF, sin_TF)


def _rotated(x: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    cos, sin, end = cos_TF[:, None], sin_TF[:, None], 2 * cos_TF.size(1)
    a, b = x[..., :end].to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return rotated if end == x.size(-1) else torch.cat([rotated, x[..., end:]], -1)


rotate_one = gpu_compiled(_rotated)
"""Applies the rotary embedding to one tensor, without gradient."""
