"""Selective activation recomputation: backward rebuilds cheap tensors instead of keeping them.

It is used for tensors that one pass over memory computes from tensors that are kept anyway. They
are two thirds of a layer's activations and take at most a tenth of its time; recomputing whole
layers costs a third.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

_Sources = dict[int, tuple[Tensor, Callable[[], Tensor]]]
"""The tensors to recompute and their functions, by the address of the storage."""


class SelectiveRecompute:
    """Saves tensors for backward within the block, but recomputes those named in `recompute`.

        with SelectiveRecompute() as selective:
            y = linear(normed)
            selective.recompute(normed, lambda: norm(x))

    All views of a named tensor's storage are recomputed. `recompute_fn` is called without gradient,
    once for each saved view, and returns a tensor of the same shape and strides.
    """

    def __init__(self) -> None:
        self._saved: list[_Saved] = []
        self._sources: _Sources = {}

    def recompute(self, tensor: Tensor, recompute_fn: Callable[[], Tensor]) -> None:
        """Marks a tensor to be recomputed by `recompute_fn` instead of saved."""
        # kept to the end of the block, so that its address is not reused
        self._sources[tensor.untyped_storage().data_ptr()] = tensor.detach(), recompute_fn

    def __enter__(self) -> SelectiveRecompute:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _Saved.restore)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for saved in self._saved:
            saved.release(self._sources)
        # The hooks refer to this object: without this, the reference cycle would keep all that the
        # functions hold until a garbage collection.
        del self._hooks, self._saved, self._sources

    def _pack(self, tensor: Tensor) -> _Saved:
        # Detached: a node that saves its own output would otherwise hold itself.
        saved = _Saved(tensor.detach())
        self._saved.append(saved)
        return saved


class _Saved:
    """A tensor saved for backward: itself, or its view of a recomputed one."""

    def __init__(self, tensor: Tensor) -> None:
        self._restore = lambda: tensor

    def restore(self) -> Tensor:
        """Returns the tensor, recomputed if it was dropped."""
        return self._restore()

    def release(self, sources: _Sources) -> None:
        """Drops the tensor if one of the sources recomputes it."""
        tensor = self._restore()
        if found := sources.get(tensor.untyped_storage().data_ptr()):
            source, recompute_fn = found
            offset = tensor.storage_offset() - source.storage_offset()
            view = tensor.size(), tensor.stride(), offset
            self._restore = partial(_recomputed, recompute_fn, source.stride(), view)


@torch.no_grad()
def _recomputed(
    recompute_fn: Callable[[], Tensor], stride: tuple[int, ...], view: tuple[Any, ...]
) -> Tensor:
    """Returns the view (size, stride, offset) of a recomputed tensor, whose strides are known."""
    made = recompute_fn().detach()
    if made.stride() != stride:
        raise AssertionError(f"recomputed with strides {made.stride()} instead of {stride}")
    size, strides, offset = view
    return made.as_strided(size, strides, made.storage_offset() + offset)
