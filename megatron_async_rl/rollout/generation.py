"""Generates across weight updates: the resume loop between the policy and the server.

A weight update may abort a request; the server then returns the tokens sampled so far. Their KV
cache came from the old weights, so the input and these tokens are sent again as a new prompt, which
the server prefills under the new weights:

    wait until the gate is open -> request -> append the tokens -> "abort"? repeat : return

A stop text may begin before an interruption and end after it, or be spelled in more tokens than the
server expects, so it is searched for here too.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Sequence

from megatron_async_rl.errors import DataError, EngineTimeout
from megatron_async_rl.protocol.types import Segment
from megatron_async_rl.rollout.engine_client import EngineClient, RequestOutput, Sampling
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.samples.routing import CallExperts
from megatron_async_rl.rollout.workflow import Completion

SaveProgress = Callable[[list[Segment], bool], Awaitable[None]]  # segments so far, interrupted


class Generator:
    def __init__(
        self,
        client: EngineClient,
        gate: Gate,
        cache_key: Callable[[], str | None],
        context_tokens: int,
        vocabulary_size: int,
        decode: Callable[[list[int]], str],
    ) -> None:
        self._client = client
        self._gate = gate
        self._cache_key = cache_key  # of the current weights (interruption.py)
        self._context_tokens = context_tokens
        self._vocabulary_size = vocabulary_size
        self._decode = decode  # with special tokens; for stop texts
        self.num_tokens = 0  # generated so far by all calls
        self.timed_out = asyncio.Event()  # a request was not answered in time

    async def generate(
        self,
        ids: list[int],
        sampling: Sampling,
        resumed: Iterable[Segment] = (),
        save: SaveProgress | None = None,
        experts: CallExperts | None = None,
    ) -> Completion:
        """Generates to the end across any number of weight updates: one segment per version.

        `resumed`: tokens that an earlier, interrupted call with the same `ids` has sampled.
        `save` is awaited after each request. `experts` gets those of all positions. Stops at
        model.context_tokens, and with the first token that completes a text of `sampling.stop`.
        Raises DataError for ids outside the vocabulary, which would crash the server, and
        EngineError.
        """
        self._check(ids)
        segments = list(resumed)
        tokens = [*ids, *(token for segment in segments for token in segment.ids)]
        end = min(len(ids) + sampling.max_new_tokens, self._context_tokens)
        while True:
            if len(tokens) > len(ids) and tokens[-1] in sampling.stop_token_ids:
                return Completion(segments, "stop")  # aborted just after its last token
            if len(tokens) >= end:
                return Completion(segments, "length")
            output = await self._request(
                tokens, dataclasses.replace(sampling, max_new_tokens=end - len(tokens)), experts
            )
            for segment in output.segments:
                tokens += segment.ids
                self.num_tokens += len(segment.ids)
            if experts and output.segments:
                experts.add(output.experts, len(tokens))
            segments = _merge_versions([*segments, *output.segments])
            num_new = sum(len(segment.ids) for segment in output.segments)
            kept = num_tokens_to_stop(tokens[len(ids) :], num_new, sampling.stop, self._decode)
            if kept is not None:
                return Completion(_first_tokens(segments, kept), "stop")
            if save and segments:
                await save(segments, output.stop == "abort")
            if output.stop != "abort":
                return Completion(segments, output.stop)

    async def _request(
        self, tokens: list[int], sampling: Sampling, experts: CallExperts | None
    ) -> RequestOutput:
        first = experts.num_known if experts else None
        try:
            async with self._gate.request():
                return await self._client.generate(tokens, sampling, self._cache_key(), first)
        except EngineTimeout:
            self.timed_out.set()
            raise

    def _check(self, ids: list[int]) -> None:
        size = self._vocabulary_size
        if not ids or min(ids) < 0 or max(ids) >= size:
            found = f"{len(ids)} token ids" + (f" from {min(ids)} to {max(ids)}" if ids else "")
            raise DataError(
                f"a workflow asked to generate from {found}; there must be one or more, each from "
                f"0 to {size - 1} (the model's vocabulary)"
            )


def _first_tokens(segments: list[Segment], count: int) -> list[Segment]:
    kept = []
    for segment in segments:
        if count > 0:
            kept.append(Segment(segment.version, segment.ids[:count], segment.logprobs[:count]))
        count -= len(segment.ids)
    return kept


def _merge_versions(segments: list[Segment]) -> list[Segment]:
    """Joins adjacent segments of the same version."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].version == segment.version:
            last = merged.pop()
            ids, logprobs = last.ids + segment.ids, last.logprobs + segment.logprobs
            segment = Segment(last.version, ids, logprobs)
        merged.append(segment)
    return merged


def num_tokens_to_stop(
    ids: list[int], num_new: int, stop: Sequence[str], decode: Callable[[list[int]], str]
) -> int | None:
    """Returns how many of the response's tokens it takes until one of the texts is complete.

    `ids`: the whole response; all but its last `num_new` tokens have been searched before. Returns
    None if the response has none of the texts. Tokens after the returned ones were sampled too
    late; leaving them out does not change the distribution of the others.
    """
    if not stop or not num_new:
        return None
    # a token has at least one byte, so a text that ends in a new token begins in this window
    start = max(0, len(ids) - num_new - max(len(text.encode()) for text in stop))
    window = ids[start:]

    def is_complete(count: int) -> bool:
        decoded = decode(window[:count])
        return any(text in decoded for text in stop)

    if not is_complete(len(window)):
        return None
    return start + bisect.bisect_left(range(len(window)), True, key=is_complete)
