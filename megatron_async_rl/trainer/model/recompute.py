"""Activations that backward makes again instead of keeping: those that a pass over memory makes from others kept anyway.

A tenth of a layer's time at most, for two thirds of its activations; recomputing whole layers costs a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SelectiveRecompute:
    """In the block, what is saved for backward is kept but for tensors named in `instead`, whichever views of them.

    with Remake() as remake:
        y = linear(normed)
        remake.instead(normed, lambda: norm(x))

    The recipe is called without gradient, once for each saved view, and returns a tensor of the same shape and strides.
    """

    def __init__(self) -> None:
        self._saved: list[_Saved] = []
        self._recipes: dict[int, _Recipe] = {}  # by the address of the storage

    def instead(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        self._recipes[tensor.untyped_storage().data_ptr()] = _Recipe(tensor.detach(), make)

    def __enter__(self) -> SelectiveRecompute:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _Saved.restore)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for saved in self._saved:
            saved.settle(self._recipes)
        for recipe in self._recipes.values():
            recipe.tensor = None
        # The hooks know this object: without a cut the circle, and what the recipes hold, would stay until a collection.
        del self._hooks, self._saved, self._recipes

    def _pack(self, tensor: Tensor) -> _Saved:
        # Detached: a node that saves its own output would otherwise hold itself.
        saved = _Saved(tensor.detach())
        self._saved.append(saved)
        return saved


class _Recipe:
    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        self.tensor: Tensor | None = (
            tensor  # until the end of the block, so that no other gets its memory
        )
        self.make, self.stride, self.offset = make, tensor.stride(), tensor.storage_offset()


class _Saved:
    """One saved tensor: itself, or which view of what is made again."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.recipe: _Recipe | None = None
        self.view: tuple[torch.Size, tuple[int, ...], int] | None = None

    def settle(self, recipes: dict[int, _Recipe]) -> None:
        assert self.tensor is not None
        self.recipe = recipes.get(self.tensor.untyped_storage().data_ptr())
        if self.recipe is not None:
            offset = self.tensor.storage_offset() - self.recipe.offset
            self.view = (self.tensor.size(), self.tensor.stride(), offset)
            self.tensor = None

    def restore(self) -> Tensor:
        if self.tensor is not None:
            return self.tensor
        assert self.recipe is not None and self.view is not None
        with torch.no_grad():
            made = self.recipe.make().detach()
        if made.stride() != self.recipe.stride:
            raise AssertionError(f"made with strides {made.stride()} what had {self.recipe.stride}")
        size, stride, offset = self.view
        return made.as_strided(size, stride, made.storage_offset() + offset)
