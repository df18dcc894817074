"""Measures how much two outputs of one operation differ, and prints the table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from megatron_async_rl.trainer.comparison.operations import (
    EMBEDDING,
    FINAL_NORM,
    LAYER,
    ROUTER,
    ROUTER_BIAS,
    layer_operation,
)

# Of the root mean square, for outputs that depend on one rounded operation: a few roundings to the
# type of the tensors, and sums of some thousand terms in float32.
_ROUNDINGS, _SUMS = 2.0, 64.0


@dataclass
class Difference:
    """The difference of the trainer's output from the engine's, over all sequences."""

    squares: float = 0.0
    reference: float = 0.0
    """Sum of the squares of the engine's output."""
    largest: float = 0.0

    def add(self, engine: Tensor, trainer: Tensor) -> None:
        difference = trainer.double() - engine.double()
        self.squares += float(difference.square().sum())
        self.reference += float(engine.double().square().sum())
        largest = float(difference.abs().max())
        self.largest = max(self.largest, math.inf if math.isnan(largest) else largest)

    @property
    def relative(self) -> float:
        """Root mean square of the difference over that of the engine's output."""
        ratio = self.squares / self.reference if self.reference else float(self.squares > 0)
        return math.sqrt(ratio) if math.isfinite(ratio) else math.inf


@dataclass
class Comparison:
    """The differences of all operations in the order of the forward pass."""

    num_layers: int
    resolution: float
    """Relative distance of neighboring numbers of the coarser of both sides' types."""
    num_experts_chosen: int = 0
    differences: dict[str, Difference] = field(default_factory=dict)
    other_experts: dict[int, list[float]] = field(default_factory=dict)
    """Fraction of the tokens of each sequence that choose other experts, by layer."""

    def add(self, engine: dict[str, Tensor], trainer: dict[str, Tensor], num_tokens: int) -> None:
        """Compares the operations that both sides have, of the first `num_tokens` tokens."""
        for name in engine.keys() & trainer.keys():
            ours, theirs = trainer[name][:num_tokens], engine[name].flatten(0, -2)[:num_tokens]
            if ours.shape == theirs.shape:
                self.differences.setdefault(name, Difference()).add(theirs, ours)
                if name.endswith(f": {ROUTER}"):
                    layer = int(name.split()[1].rstrip(":"))
                    bias = trainer.get(layer_operation(layer, ROUTER_BIAS))
                    self._compare_experts(layer, theirs, ours, bias)

    def _compare_experts(
        self, layer: int, engine: Tensor, trainer: Tensor, bias: Tensor | None
    ) -> None:
        scores = [logits.float() for logits in (engine, trainer)]
        if bias is not None:
            scores = [logits.sigmoid() + bias for logits in scores]
        chosen = [each.topk(self.num_experts_chosen).indices.sort().values for each in scores]
        other = (chosen[0] != chosen[1]).any(dim=-1).double().mean()
        self.other_experts.setdefault(layer, []).append(float(other))

    def bound(self, name: str) -> float:
        """Returns the relative difference of an operation that rounding explains.

        Rounding errors of n operations in a row add up like sqrt(n), as independent ones do.
        """
        eps = torch.finfo(torch.float32).eps
        return (_ROUNDINGS * self.resolution + _SUMS * eps) * math.sqrt(self._depths[name])

    def first_beyond_rounding(self) -> str | None:
        """Returns the name of the first operation that differs by more than its bound."""
        compared = (name for name in self._depths if name in self.differences)
        beyond = (n for n in compared if not self.differences[n].relative <= self.bound(n))
        return next(beyond, None)

    @cached_property
    def _depths(self) -> dict[str, int]:
        """Names of the operations in their order, with the number of operations up to each."""
        layers = range(self.num_layers)
        names = [layer_operation(n, operation.name) for n in layers for operation in LAYER]
        return {name: n for n, name in enumerate([EMBEDDING, *names, FINAL_NORM], start=1)}

    def table(self) -> Iterable[str]:
        """Yields lines: a layer each, with the relative difference of its operations."""
        columns = [
            operation.name
            for operation in LAYER
            if any(name.endswith(f": {operation.name}") for name in self.differences)
        ]
        width = max([len("other experts"), *map(len, columns)]) + 2
        others = ["other experts"] if self.other_experts else []
        yield "layer" + "".join(f"{column:>{width}}" for column in columns + others)
        for layer in range(self.num_layers):
            cells = [self._cell(layer_operation(layer, column)) for column in columns]
            if found := self.other_experts.get(layer):
                cells.append(f"{sum(found) / len(found):.2%}")
            yield f"{layer:>5}" + "".join(f"{cell:>{width}}" for cell in cells)
        for name in (EMBEDDING, FINAL_NORM):
            if name in self.differences:
                yield f"{name}: {self._cell(name)}"

    def _cell(self, name: str) -> str:
        found = self.differences.get(name)
        if found is None:
            return "-"
        return f"{found.relative:.2g}" + ("*" if not found.relative <= self.bound(name) else "")
