"""What a sample is: one turn here, or a class of your own named by `rollout.workflow`.

    class ThreeTries(Workflow):
        async def run(self, prompt, policy, sampling):
            episode = Episode(prompt.ids)
            for _ in range(3):
                turn = await policy.generate(episode.ids, sampling)
                episode.sampled(turn)
                text = policy.tokenizer.decode(turn.ids)
                if turn.stop == "length" or await policy.judge(text) == 1.0:
                    break
                episode.given(policy.tokenizer.encode("\\nThat is wrong. Try again.\\n"))
            return episode.sample(turn.stop, text)

A workflow awaits `policy.generate` as often as it likes; weight updates in between and in the middle are not its
concern. What it returns (types.Sample) has a version on every token that the policy sampled, and those alone are trained
on: what the policy was given, by you or by a tool, is context. `text` is what the reward function is shown. After a crash
a sample goes on in the middle of its first turn; one that was further begins anew.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.protocol.types import Prompt, Sample, Segment, StopReason, join_segments
from megatron_async_rl.rollout.engine_client import Sampling


@dataclass(frozen=True)
class Completion:
    """A finished generation: segments of adjacent tokens of one version each."""

    segments: list[Segment]
    stop: StopReason

    @property
    def ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment.ids]


class Policy(Protocol):
    """The model being trained, as a workflow sees it."""

    tokenizer: Tokenizer

    async def generate(self, ids: list[int], sampling: Sampling) -> Completion:
        """At most `sampling.max_new_tokens`, and no more than model.context_tokens has room for: none, where it is full.

        Raises DataError for ids outside the model's vocabulary.
        """

    async def judge(self, text: str) -> float:
        """What the reward function says of `text` as an answer to this prompt; the sample's own reward comes later.

        Raises NoVerdict when the judges fail, or the lease has ended.
        """


class Episode:
    """A sample of several turns as it grows: what the policy is given, and what it samples, in order."""

    def __init__(self, prompt_ids: np.ndarray) -> None:
        self.ids: list[int] = prompt_ids.tolist()
        self._given = len(self.ids)  # since the last turn
        self._turns: list[Sample] = []

    def sampled(self, turn: Completion) -> None:
        """What `policy.generate(episode.ids, ...)` returned."""
        before = np.asarray(self.ids[len(self.ids) - self._given :], np.int32)
        self._turns.append(join_segments(before, turn.segments, turn.stop, ""))
        self.ids += turn.ids
        self._given = 0

    def given(self, ids: Iterable[int]) -> None:
        """What somebody else says: context for the turns to come, nothing to train on."""
        more = [int(token) for token in ids]
        self.ids += more
        self._given += len(more)

    def sample(self, stop: StopReason, text: str) -> Sample:
        """Up to the last turn: no token was sampled from what was given after it. Raises DataError when there was no turn."""
        if not (turns := self._turns):
            raise DataError("an episode without a turn: nothing was sampled")
        return Sample(
            ids=np.concatenate([turn.ids for turn in turns]),
            logprobs=np.concatenate([turn.logprobs for turn in turns]),
            versions=np.concatenate([turn.versions for turn in turns]),
            stop=stop,
            text=text,
            num_interrupts=sum(turn.num_interrupts for turn in turns),
        )


class Workflow(Protocol):
    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample: ...


class SingleTurn:
    """The prompt in, one response out."""

    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        completion = await policy.generate(prompt.ids.tolist(), sampling)
        text = policy.tokenizer.decode(completion.ids)
        return join_segments(prompt.ids, completion.segments, completion.stop, text)


def load_workflow(name: str) -> Workflow:
    """`single_turn`, or package.module:Class. Raises ConfigError when it cannot be imported."""
    if name == "single_turn":
        return SingleTurn()
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ImportError("not of the form package.module:Class")
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as e:
        raise ConfigError(
            f"rollout.workflow = {name!r} cannot be loaded: {e}; use single_turn, or package.module:Class on PYTHONPATH"
        ) from e
