"""The order of prompts: a pure function of the sources, the seed and the number of prompts before.

The controller rebuilds its state from the journal by asking for the same prompts again, so the
order of an existing run must never change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megatron_async_rl.protocol.types import Prompt


class SourcePrompts(NamedTuple):
    prompts: list[Prompt]
    weight: float = 1.0


class PromptStream:
    """Prompts of one or several sources, each in an order that depends on seed and epoch alone.

    Of n prompts, a source of weight share p has had at most n p + 1.
    """

    def __init__(self, sources: list[SourcePrompts], seed: int) -> None:
        total = sum(source.weight for source in sources)
        self._shares = [source.weight / total for source in sources]
        self._taken = [0] * len(sources)
        self._prompts = [
            # a single source has no number in its seed, so that runs of earlier versions can
            # continue
            _shuffled(source.prompts, [seed] if len(sources) == 1 else [seed, index])
            for index, source in enumerate(sources)
        ]

    def next(self) -> Prompt:
        """Returns the next prompt of the source that is most behind its share."""
        position = sum(self._taken) + 1
        behind = [share * position - n for share, n in zip(self._shares, self._taken, strict=True)]
        chosen = behind.index(max(behind))
        self._taken[chosen] += 1
        return next(self._prompts[chosen])


def _shuffled(prompts: list[Prompt], seed: list[int]) -> Iterator[Prompt]:
    """Yields the prompts of one source, epoch after epoch."""
    for epoch in itertools.count():
        for index in np.random.default_rng([*seed, epoch]).permutation(len(prompts)):
            yield prompts[index]
