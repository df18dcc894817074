"""What a sample is: one turn here, or a class of your own named by `rollout.workflow`.

    class TwoTries(Workflow):
        async def run(self, prompt, policy, sampling):
            first = await policy.generate(prompt.ids.tolist(), sampling)
            ...
            return Sample(...)

A workflow awaits `policy.generate` as often as it likes; weight updates in between and in the middle are not its
concern. It returns flat arrays (types.Sample) with a version on every token that the policy sampled.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

from megatron_async_rl.errors import ConfigError
from megatron_async_rl.rollout.client import Sampling
from megatron_async_rl.tokenizer import Tokenizer
from megatron_async_rl.types import Prompt, Sample, Segment, StopReason, join_segments


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

    async def generate(self, ids: list[int], sampling: Sampling) -> Completion: ...


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
