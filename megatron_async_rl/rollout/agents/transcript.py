"""The exact tokens of an episode: a tree of requests, of which each leaf is a training sequence.

A request is text: the chat template's rendering of its messages. If the text begins with the whole
text of an earlier turn (its prompt and what was sampled), the request continues that turn: its ids
are the turn's ids, as sampled, and then those of the new text. Nothing that was sampled is ever
tokenized again. A request that begins otherwise, as after a compaction of the history, by a
sub-agent or as a retry, starts a branch.

Each leaf is trained as one sequence. The turns that several leaves share are trained in the first
of them and are context in the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import NOT_GENERATED, Sample, StopReason
from megatron_async_rl.rollout.workflow import Completion


@dataclass
class Turn:
    """A finished request. `ids` are those of its prompt and then the sampled ones."""

    text: str
    ids: list[int]
    completion: Completion
    parent: Turn | None
    num_children: int = 0
    raw: str = ""  # what was sampled, without the token that ended it
    number: int = field(default=0)  # in the order of their ends

    @property
    def num_prompt(self) -> int:
        return len(self.ids) - len(self.completion.ids)


@dataclass(frozen=True)
class Break:
    """Where a request departs from the turn with which it shares the most text."""

    turn: Turn
    offset: int  # characters in common


class Transcript:
    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def continued(self, text: str) -> Turn | None:
        """Returns the longest turn whose whole text begins `text`."""
        matches = [turn for turn in self.turns if text.startswith(turn.text)]
        return max(matches, key=lambda turn: len(turn.text), default=None)

    def nearest_break(self, text: str) -> Break | None:
        """Returns where `text` departs from the turn that it shares the most text with."""
        breaks = [Break(turn, _num_common(turn.text, text)) for turn in self.turns]
        return max(breaks, key=lambda b: b.offset, default=None)

    def add(self, turn: Turn) -> None:
        turn.number = len(self.turns)
        self.turns.append(turn)
        if turn.parent:
            turn.parent.num_children += 1

    @property
    def num_sequences(self) -> int:
        return sum(not turn.num_children for turn in self.turns)

    def sample(self, stop: StopReason, reward: float | None) -> Sample:
        """Returns the episode as one sample of several sequences. Raises DataError without turns.

        The text is that of all turns in order, for the reward function.
        """
        if not self.turns:
            raise DataError("the agent made no request that was answered: nothing was sampled")
        trained: set[int] = set()
        sequences = [_sequence(turn, trained) for turn in self.turns if not turn.num_children]
        ids, logprobs, versions = (
            np.concatenate(arrays) for arrays in zip(*sequences, strict=True)
        )
        ends = np.cumsum([len(sequence[0]) for sequence in sequences])
        return Sample(
            ids=ids,
            logprobs=logprobs,
            versions=versions,
            stop=stop,
            text="\n\n".join(turn.raw for turn in self.turns),
            num_interrupts=sum(max(0, len(t.completion.segments) - 1) for t in self.turns),
            starts=[0, *ends[:-1].tolist()] if len(sequences) > 1 else [],
            reward=reward,
        )


def _sequence(leaf: Turn, trained: set[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids, logprobs and versions of the path to a leaf; marks its turns as trained."""
    ids = np.asarray(leaf.ids, np.int32)
    logprobs = np.zeros(len(ids), np.float32)
    versions = np.full(len(ids), NOT_GENERATED, np.int32)
    turn: Turn | None = leaf
    while turn:
        if turn.number not in trained:
            trained.add(turn.number)
            position = turn.num_prompt
            for segment in turn.completion.segments:
                end = position + len(segment.ids)
                logprobs[position:end] = segment.logprobs
                versions[position:end] = segment.version
                position = end
        turn = turn.parent
    return ids, logprobs, versions


def _num_common(a: str, b: str) -> int:
    """Returns the number of leading characters in common, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
