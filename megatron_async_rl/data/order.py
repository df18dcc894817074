"""The order of prompts: a pure function of the sources, the seed and the number of prompts before.

The controller rebuilds its state from the journal by asking for the same prompts again, so the
order of an existing run must never change.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_async_rl.protocol.types import Prompt


class SourcePrompts(NamedTuple):
    prompts: list[Prompt]
    weight: float = 1.0


class PromptStream:
    """Prompts of one or several sources, each in an order that depends on seed and epoch alone.

    Of n prompts, a source of weight share p has had at most n p + 1. A stream that starts at
    `start` continues exactly where the first `start` prompts of an earlier run ended.
    """

    def __init__(self, sources: list[SourcePrompts], seed: int, start: int = 0) -> None:
        total = sum(source.weight for source in sources)
        self._shares = [source.weight / total for source in sources]
        self._sources = [
            # a single source has no number in its seed: runs of earlier versions must go on
            _Epochs(source.prompts, [seed] if len(sources) == 1 else [seed, index])
            for index, source in enumerate(sources)
        ]
        self.position = 0  # prompts returned so far, over all sources and epochs
        for _ in range(start):
            self._choose()

    def next(self) -> Prompt:
        source = self._choose()
        return source.prompt(source.taken - 1)

    def _choose(self) -> _Epochs:
        """Returns the source that is most behind its share, and counts the prompt as taken."""
        self.position += 1
        behind = [
            share * self.position - source.taken
            for share, source in zip(self._shares, self._sources, strict=True)
        ]
        source = self._sources[behind.index(max(behind))]
        source.taken += 1
        return source


class _Epochs:
    """The prompts of one source, shuffled epoch after epoch."""

    def __init__(self, prompts: list[Prompt], seed: list[int]) -> None:
        self._prompts = prompts
        self._seed = seed
        self._epoch = -1
        self.taken = 0

    def prompt(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            rng = np.random.default_rng([*self._seed, epoch])
            self._order = rng.permutation(len(self._prompts))
        return self._prompts[self._order[offset]]
