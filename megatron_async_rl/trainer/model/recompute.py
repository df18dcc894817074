"""Selective activation recomputation: backward rebuilds cheap tensors instead of keeping them.

For tensors that one pass over memory makes from others that are kept anyway: they are two thirds of
a layer's activations and take at most a tenth of its time. Recomputing whole layers costs a third.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
        self._sources: dict[int, _Source] = {}  # by the address of the storage

    def recompute(self, tensor: Tensor, recompute_fn: Callable[[], Tensor]) -> None:
        """Marks a tensor to be recomputed by `recompute_fn` instead of saved."""
        source = _Source(tensor.detach(), recompute_fn)
        self._sources[tensor.untyped_storage().data_ptr()] = source

    def __enter__(self) -> SelectiveRecompute:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _Saved.restore)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for saved in self._saved:
            saved.release(self._sources)
        for source in self._sources.values():
            source.tensor = None
        # The hooks refer to this object: without this, the reference cycle would keep all that the
        # functions hold until a garbage collection.
        del self._hooks, self._saved, self._sources

    def _pack(self, tensor: Tensor) -> _Saved:
        # Detached: a node that saves its own output would otherwise hold itself.
        saved = _Saved(tensor.detach())
        self._saved.append(saved)
        return saved


class _Source:
    """A tensor to recompute; kept to the end of the block, so that its address is not reused."""

    def __init__(self, tensor: Tensor, recompute_fn: Callable[[], Tensor]) -> None:
        self.tensor: Tensor | None = tensor
        self.recompute_fn = recompute_fn
        self.stride, self.offset = tensor.stride(), tensor.storage_offset()


class _Saved:
    """A tensor saved for backward: itself, or its view of a recomputed one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.source: _Source | None = None
        self.view: tuple[Any, ...] | None = None  # size, stride, offset in the source

    def release(self, sources: dict[int, _Source]) -> None:
        """Drops the tensor if one of the sources recomputes it."""
        assert self.tensor is not None
        self.source = sources.get(self.tensor.untyped_storage().data_ptr())
        if self.source is not None:
            offset = self.tensor.storage_offset() - self.source.offset
            self.view = (self.tensor.size(), self.tensor.stride(), offset)
            self.tensor = None

    def restore(self) -> Tensor:
        """Returns the tensor, recomputed if it was dropped."""
        if self.tensor is not None:
            return self.tensor
        assert self.source is not None and self.view is not None
        with torch.no_grad():
            made = self.source.recompute_fn().detach()
        if made.stride() != self.source.stride:
            raise AssertionError(
                f"recomputed with strides {made.stride()} instead of {self.source.stride}"
            )
        size, stride, offset = self.view
        return made.as_strided(size, stride, made.storage_offset() + offset)
