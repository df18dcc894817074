"""The policy as the workflow of one leased sample sees it (implements workflow.Policy)."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.data import chat_template
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import DataError, ScoreUnavailable
from megatron_async_rl.model.routing import Routing
from megatron_async_rl.protocol.messages import (
    Generate,
    Message,
    PartialSample,
    ScoreRequest,
    ScoreResult,
)
from megatron_async_rl.protocol.types import (
    NO_EXPERTS,
    Partial,
    Prompt,
    Sample,
    SampleKey,
    Segment,
    token_arrays,
)
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.generation import Generator
from megatron_async_rl.rollout.samples.partials import PartialStore
from megatron_async_rl.rollout.samples.routing import CallExperts, SampleExperts
from megatron_async_rl.rollout.workflow import Completion

_DISTRIBUTION = ("temperature", "top_p", "top_k", "min_p")  # of Sampling, that a workflow must keep
Send = Callable[[Message], Awaitable[None]]  # to the controller


class ScoreClient:
    """Score requests of workflows that wait for the controller's result."""

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._pending: dict[tuple[SampleKey, int], asyncio.Future[ScoreResult]] = {}

    async def score(self, request: ScoreRequest) -> float:
        """Returns the reward. Raises ScoreUnavailable."""
        pending = request.key, request.call
        result_future = self._pending[pending] = asyncio.get_running_loop().create_future()
        try:
            await self._send(request)
            result = await asyncio.wait_for(result_future, self._timeout_s)
        except TimeoutError:
            raise ScoreUnavailable(
                f"no score within rollout.lease_timeout_s = {self._timeout_s:g}"
            ) from None
        finally:
            del self._pending[pending]
        if result.reward is None:
            raise ScoreUnavailable(
                f"no score for request {request.call} of sample {request.key}: {result.error}"
            )
        return result.reward

    def deliver(self, result: ScoreResult) -> None:
        future = self._pending.get((result.key, result.call))
        if future and not future.done():
            future.set_result(result)


@dataclass(frozen=True)
class PolicyServices:
    """Shared by all samples of a rollout worker."""

    config: Config
    tokenizer: Tokenizer
    generator: Generator
    partials: PartialStore
    scores: ScoreClient
    send: Send
    routing: Routing | None = None  # with rollout.routing_replay


def plain_ids(ids: Iterable[int]) -> list[int]:
    """Returns token ids as a list of plain numbers, also those of an array such as prompt.ids."""
    if isinstance(ids, str | bytes):
        raise DataError(
            f"policy.generate got a {type(ids).__name__}, must be token ids",
            "read them with policy.tokenizer.encode(text)",
        )
    return [int(token) for token in ids]


class SamplePolicy:
    """One sample under one lease.

    A call with the input of the sample's partial sample resumes from it. Samples of an evaluation
    are neither kept nor resumed.
    """

    def __init__(
        self, services: PolicyServices, lease: Generate, index: int, partial: Partial | None
    ) -> None:
        self.tokenizer = services.tokenizer
        self.config = services.config
        self._services = services
        self._key = lease.key(index)
        self._sample_id = lease.group_id, index
        self._resumable = lease.purpose == "train"
        self._distribution = {name: getattr(lease, name) for name in _DISTRIBUTION}
        self._num_scored = 0
        self._partial = services.partials.longest(self._sample_id, partial, lease.floor_version)
        routing = services.routing if self._resumable else None
        self._experts = SampleExperts(routing) if routing else None

    async def generate(self, ids: Iterable[int], sampling: Sampling) -> Completion:
        ids = plain_ids(ids)
        if sampling.stop and not (self.config.rollout.stop or self.config.has_agent):
            raise DataError(
                f"policy.generate got sampling.stop = {sampling.stop}, and a server reads no text "
                "without rollout.stop",
                "set rollout.stop; turns that it is not for get replace(sampling, stop=())",
            )
        generator = self._services.generator
        if not self._resumable:
            return await generator.generate(ids, sampling)

        for name, wanted in self._distribution.items():
            if (given := getattr(sampling, name)) != wanted:
                raise DataError(
                    f"policy.generate got sampling.{name} = {given}, and the trainer needs the "
                    f"distribution of rollout.{name} = {wanted}",
                    f"keep it, or set rollout.{name} for all turns",
                )
        partial = self._resumed(ids)
        experts = self._experts.begin(ids, partial) if self._experts else None
        resumed = partial.segments() if partial else []
        save = functools.partial(self._save, ids, experts)
        completion = await generator.generate(ids, sampling, resumed, save, experts)
        if self._experts and experts:
            self._experts.end([*ids, *completion.ids], experts)
        return completion

    async def score(self, text: str) -> float:
        if not isinstance(text, str):
            raise DataError(f"policy.score got a {type(text).__name__}, must be a text")
        self._num_scored += 1
        request = ScoreRequest(self._key, text, call=self._num_scored)
        return await self._services.scores.score(request)

    def next_turn(
        self, prompt: Prompt, turn: Completion, messages: list[dict[str, Any]]
    ) -> np.ndarray:
        data = self.config.data
        if not (data.chat_template or isinstance(prompt.row.get("prompt"), list)):
            return self.tokenizer.encode("".join(message["content"] for message in messages))
        text = self.tokenizer.render_next_turn(
            messages, data.chat_template_name, chat_template.template_variables(self.config)
        )
        ids = self.tokenizer.encode(text)
        # the template ends the turn with the token that the policy may have sampled itself
        return ids[1:] if turn.ids and ids[:1].tolist() == turn.ids[-1:] else ids

    def with_experts(self, sample: Sample) -> Sample:
        """Returns the workflow's sample with the experts of its tokens (rollout.routing_replay)."""
        return self._experts.added_to(sample) if self._experts else sample

    def _resumed(self, ids: list[int]) -> Partial | None:
        partial = self._partial
        if partial is None or partial.ids[: partial.num_input].tolist() != ids:
            return None
        self._partial = None  # another call with this input starts from the beginning
        return partial

    async def _save(
        self,
        ids: list[int],
        experts: CallExperts | None,
        segments: list[Segment],
        interrupted: bool,
    ) -> None:
        """Keeps the tokens so far; those of an interrupted call go to the controller too."""
        tokens = [*ids, *(token for segment in segments for token in segment.ids)]
        chosen = experts.of_tokens(len(tokens)) if experts else NO_EXPERTS
        partial = Partial(*token_arrays(tokens, [(len(ids), segments)]), chosen)
        self._services.partials.keep(self._sample_id, partial)
        if interrupted:
            await self._services.send(PartialSample(self._key, partial))
