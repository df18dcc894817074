"""How a sample is generated: the interface of workflows, named by `rollout.workflow`.

docs/workflows.md has examples. A workflow may call `policy.generate` any number of times; weight
updates between and during calls are transparent. The sample it returns has a version on each token
that the policy sampled, and only those are trained; all other tokens (yours or a tool's) are
context. The reward function scores its `text`. After a crash a sample resumes within its first
turn; a later turn restarts the sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import (
    Prompt,
    Sample,
    Segment,
    StopReason,
    generated_runs,
    token_arrays,
)
from megatron_async_rl.rollout.engine_client import Sampling


@dataclass(frozen=True)
class Completion:
    """A finished generation: adjacent segments, each of one version."""

    segments: list[Segment]
    stop: StopReason

    @property
    def ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment.ids]


class Policy(Protocol):
    """The model being trained, as a workflow sees it."""

    tokenizer: Tokenizer
    config: Config  # of the run

    async def generate(self, ids: Iterable[int], sampling: Sampling) -> Completion:
        """Generates up to `sampling.max_new_tokens`, fewer if model.context_tokens is reached.

        Returns an empty completion if no room is left. Raises DataError for ids outside the
        model's vocabulary.
        """

    async def score(self, text: str) -> float:
        """Returns the reward function's score of `text` as a response to this prompt.

        It does not replace the score of the finished sample. Raises ScoreUnavailable if scoring
        fails or the lease has ended.
        """

    def next_turn(
        self, prompt: Prompt, turn: Completion, messages: list[dict[str, Any]]
    ) -> np.ndarray:
        """Returns [num_tokens] int32: the context between `turn` and the turn that answers it.

        `messages`: {role, content} after the turn's own. For a chat prompt the tokens are those of
        the model's chat template, from the end of the turn to the start of the next response; for a
        text prompt, of the contents alone. The turn itself is not tokenized again. Raises DataError
        if the template rejects the messages.
        """


class Workflow(Protocol):
    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample: ...


class Episode:
    """A sample of several turns while it grows: context and sampled tokens in order."""

    def __init__(self, prompt_ids: np.ndarray) -> None:
        self.ids: list[int] = prompt_ids.tolist()
        self._end = 0  # of the last turn
        self._turns: list[tuple[int, list[Segment]]] = []  # with the place of the first token
        self._starts: list[int] = []  # of the turns that have a token
        self._rewards: list[float] = []
        self.metrics: dict[str, float] = {}  # yours, by name; their means are shown as user/NAME

    def add_turn(self, turn: Completion, reward: float = 0.0) -> None:
        """Appends the result of `policy.generate(episode.ids, ...)`, with its own reward.

        The reward of a turn without a token is added to that of the turn before it.
        """
        if turn.ids:
            self._starts.append(len(self.ids))
            self._rewards.append(reward)
        elif self._rewards:
            self._rewards[-1] += reward
        self._turns.append((len(self.ids), turn.segments))
        self.ids += turn.ids
        self._end = len(self.ids)

    def has_room(self, context: Sized, context_tokens: int) -> bool:
        """Returns whether a turn after `context` can have a token, given model.context_tokens."""
        return len(self.ids) + len(context) < context_tokens

    def add_context(self, ids: Iterable[int]) -> None:
        """Appends tokens that the policy did not sample; they are not trained."""
        self.ids += [int(token) for token in ids]

    def sample(
        self, stop: StopReason, text: str, discount: float = 1.0, reward: float | None = None
    ) -> Sample:
        """Returns the tokens up to the last turn.

        Raises DataError if there was no turn, or if the tokens of one were changed in `ids`.

        The last turn's reward is `reward`, or without it the score of `text` times `discount`, and
        the one given to `add_turn`. The sample's reward is the sum over its turns.
        """
        if not self._turns:
            raise DataError(
                "an episode without a turn: nothing was sampled",
                "call policy.generate and add_turn before sample",
            )
        for start, segments in self._turns:
            sampled = [token for segment in segments for token in segment.ids]
            if self.ids[start : start + len(sampled)] != sampled:
                raise DataError(
                    f"the turn that begins at episode.ids[{start}] has other tokens than were "
                    "sampled",
                    "change no sampled token: begin another Episode with the tokens that you want",
                )
        ids, logprobs, versions = token_arrays(self.ids[: self._end], self._turns)
        are_apart = self._starts == [start for start, _ in generated_runs(versions)]
        return Sample(
            ids=ids,
            logprobs=logprobs,
            versions=versions,
            stop=stop,
            text=text,
            num_interrupts=sum(max(0, len(segments) - 1) for _, segments in self._turns),
            discount=discount,
            metrics=self.metrics,
            reward=reward,
            turn_rewards=self._rewards if any(self._rewards) else [],
            turn_starts=[] if are_apart else self._starts,
        )
