"""One episode's access to the policy: from messages to exact tokens and back.

A session belongs to one sample under one lease. Its requests are generated with `policy.generate`,
so weight updates interrupt and resume them like any other. Temperature and truncation are those of
the run, not of the request: the trainer needs the distribution that was sampled from.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_async_rl.config.config import MAX_SEQUENCES
from megatron_async_rl.config.datasets import DataConfig
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import DataError, EngineError
from megatron_async_rl.observability.error_log import ErrorLog
from megatron_async_rl.rollout import tool_calls
from megatron_async_rl.rollout.agents.apis.request import (
    ChatRequest,
    FinishReason,
    Reply,
    RequestError,
)
from megatron_async_rl.rollout.agents.history import History, Place
from megatron_async_rl.rollout.agents.transcript import Transcript, Turn, TurnRewards
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.python_runner import PythonRunner
from megatron_async_rl.rollout.tool_calls import ToolCall
from megatron_async_rl.rollout.workflow import Completion, Policy
from megatron_async_rl.sandbox.sandbox import SandboxError, SandboxLost

logger = logging.getLogger(__name__)
MAX_CONCURRENT = 16  # requests of one session in the engine; more wait
MAX_COMPLETIONS = 8  # `n` of a request


@dataclass(frozen=True)
class SessionSettings:
    """Shared by all sessions of a rollout worker."""

    data: DataConfig
    max_requests: int
    python: PythonRunner
    breaks: ErrorLog = field(default_factory=lambda: ErrorLog(logger))  # of prefixes


class Session:
    def __init__(self, policy: Policy, sampling: Sampling, settings: SessionSettings) -> None:
        self.key = f"sk-{secrets.token_urlsafe(24)}"
        self.transcript = Transcript()
        self.error: Exception | None = None  # the server or the sandbox failed: so does the sample
        self.rewards = TurnRewards()
        self.earlier: dict[str, list[dict[str, Any]]] = {}  # messages by id of a response
        self.num_requests = 0
        self._policy, self._sampling, self._settings = policy, sampling, settings
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        self._num_starting = 0  # branches without a turn in the transcript so far
        self._continued: set[int] = set()  # turns without a child that a request continues
        self._history = History(policy.tokenizer, settings.data, self.transcript, settings.breaks)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._policy.tokenizer

    async def complete(self, request: ChatRequest) -> list[Reply]:
        """Returns request.n completions. Raises RequestError."""
        if not self._admit():
            raise RequestError(
                429,
                "this episode has made its rollout.agent_max_requests = "
                f"{self._settings.max_requests} requests",
                "rate_limit_error",
            )
        if self.error:
            raise self.fail(self.error)
        if not 1 <= request.n <= MAX_COMPLETIONS:
            raise RequestError(400, f"n = {request.n}, must be 1 to {MAX_COMPLETIONS}")
        place = await self._history.place(request)
        sampling = self._sampling_of(request, len(place.ids))
        answers = [
            asyncio.create_task(self._answer(request, place, sampling)) for _ in range(request.n)
        ]
        try:
            return await asyncio.gather(*answers)
        finally:
            for answer in answers:  # one that failed leaves the others running
                answer.cancel()

    def fail(self, error: Exception) -> RequestError:
        """Marks the sample as failed, not by its agent; returns the answer to its requests."""
        self.error = error
        what = "server" if isinstance(error, EngineError) else "sandbox"
        return RequestError(503, f"the {what} failed: {error}", "api_error")

    # ---- inside

    def _admit(self) -> bool:
        self.num_requests += 1
        return self.num_requests <= self._settings.max_requests

    async def _answer(self, request: ChatRequest, place: Place, sampling: Sampling) -> Reply:
        """Generates turns until one calls no `python`, and returns the last one as a reply."""
        turn = await self._generate(place, sampling)
        if turn is None:
            raise RequestError(
                400,
                f"the prompt has {len(place.ids)} tokens, which leaves no room in "
                "model.context_tokens",
            )
        since: list[dict[str, Any]] = []  # the request's messages: turns and outputs
        while True:
            reply = self._reply(turn, request)
            since.append({"role": "assistant", "content": turn.raw})
            programs = [c for c in reply.calls if request.runs_python and c.name == "python"]
            if not programs:
                break
            since += [await self._run(call) for call in programs]
            own = [call for call in reply.calls if call not in programs]
            if own:  # the client answers them
                reply = replace(reply, calls=own)
                break
            messages = [*request.messages, *since]
            place = await self._history.place(replace(request, messages=messages))
            following = await self._generate(place, sampling) if self._admit() else None
            if following is None:  # no room, or too many requests: the program was not answered
                del since[-len(programs) :]
                reply = replace(reply, content=turn.raw, calls=[], finish="length")
                break
            turn = following
        self._history.remember(request, reply.as_message(), since)
        return reply

    async def _run(self, call: ToolCall) -> dict[str, Any]:
        """Runs a program of the policy; returns its output as a message. Raises RequestError."""
        try:
            output = await self._settings.python.answer(call)
        except (SandboxError, SandboxLost) as e:
            raise self.fail(e) from None
        return {"role": "tool", "name": "python", "tool_call_id": call.id, "content": output}

    def _sampling_of(self, request: ChatRequest, num_prompt: int) -> Sampling:
        limit = self._sampling.max_new_tokens
        if request.max_tokens is not None:
            if request.max_tokens < 1:
                raise RequestError(400, f"max_tokens = {request.max_tokens}, must be at least 1")
            limit = min(limit, request.max_tokens)
        if not num_prompt:
            raise RequestError(400, "the prompt is empty")
        return replace(
            self._sampling, max_new_tokens=limit, stop=(*self._sampling.stop, *request.stop)
        )

    async def _generate(self, place: Place, sampling: Sampling) -> Turn | None:
        """Returns a turn, or None if model.context_tokens has no room for one."""
        with self._counted_branch(place.parent):
            async with self._slots:
                try:
                    completion = await self._policy.generate(place.ids, sampling)
                except EngineError as e:
                    raise self.fail(e) from None
                except DataError as e:
                    raise RequestError(400, str(e)) from None
            return self._add(place, completion, sampling) if completion.ids else None

    @contextlib.contextmanager
    def _counted_branch(self, parent: Turn | None) -> Iterator[None]:
        """Counts the branch that a request starts, if it does. Raises RequestError at the limit."""
        if parent and not parent.num_children and parent.number not in self._continued:
            self._continued.add(parent.number)
            try:
                yield
            finally:
                self._continued.remove(parent.number)
            return
        if self.transcript.num_sequences + self._num_starting >= MAX_SEQUENCES:
            raise RequestError(
                429, f"this episode has {MAX_SEQUENCES} branches already", "rate_limit_error"
            )
        self._num_starting += 1
        try:
            yield
        finally:
            self._num_starting -= 1

    def _add(self, place: Place, completion: Completion, sampling: Sampling) -> Turn:
        sampled, end = completion.ids, None
        if completion.stop == "stop" and sampled[-1] in sampling.stop_token_ids:
            sampled, end = sampled[:-1], sampled[-1:]
        raw = self.tokenizer.decode_all(sampled)
        ended = self.tokenizer.decode_all(end) if end else ""
        text, ids = place.text + raw + ended, [*place.ids, *completion.ids]
        turn = Turn(text, ids, completion, place.parent, raw=raw)
        self.transcript.add(turn)
        return turn

    def _reply(self, turn: Turn, request: ChatRequest) -> Reply:
        content, stop_text = turn.raw, None
        found = [(content.find(stop), stop) for stop in request.stop if stop in content]
        if found and turn.completion.stop == "stop":
            end, stop_text = min(found)
            content = content[:end]  # its last token may have more than the stop text
        content, calls = tool_calls.split(content) if request.tools else (content, [])
        finish: FinishReason = "tool_calls" if calls else turn.completion.stop
        segments = turn.completion.segments
        logprobs = [logprob for segment in segments for logprob in segment.logprobs]
        return Reply(
            content, calls, finish, turn.completion.ids, logprobs, turn.num_prompt, stop_text
        )
