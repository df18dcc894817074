"""One episode's access to the policy: from messages to exact tokens and back.

A session belongs to one sample under one lease. Its requests are generated with `policy.generate`,
so weight updates interrupt and resume them like any other. Temperature and truncation are those of
the run, not of the request: the trainer needs the distribution that was sampled from.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_async_rl.config.config import MAX_SEQUENCES
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import DataError, EngineError
from megatron_async_rl.observability.error_log import ErrorLog
from megatron_async_rl.rollout.agents import tool_calls
from megatron_async_rl.rollout.agents.tool_calls import ToolCall
from megatron_async_rl.rollout.agents.transcript import Transcript, Turn
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.workflow import Policy

logger = logging.getLogger(__name__)
MAX_CONCURRENT = 16  # requests of one session in the engine; more wait
MAX_COMPLETIONS = 8  # `n` of a request

FinishReason = Literal["stop", "length", "tool_calls"]


class RequestError(Exception):
    """A request that is answered with an error. `kind` is the type that the APIs name."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


@dataclass(frozen=True)
class ChatRequest:
    """A request of any of the APIs, in OpenAI's terms. `prompt`: a completion without messages."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    prompt: str | list[int] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    logprobs: bool = False


@dataclass(frozen=True)
class Reply:
    """One completion: what the client reads, and the tokens behind it."""

    content: str
    calls: list[ToolCall]
    finish: FinishReason
    ids: list[int]
    logprobs: list[float]
    num_prompt: int
    stop_text: str | None = None  # of `stop`, if it ended the completion


@dataclass(frozen=True)
class ChatTemplate:
    """The settings of data.* that decide how messages become text."""

    name: str | None
    variables: dict[str, Any]
    add_bos: bool | None


class Session:
    def __init__(
        self, policy: Policy, sampling: Sampling, template: ChatTemplate, max_requests: int
    ) -> None:
        self.key = f"sk-{secrets.token_urlsafe(24)}"
        self.transcript = Transcript()
        self.error: EngineError | None = None  # the server failed: so does the sample
        self.reward: float | None = None
        self.earlier: dict[str, list[dict[str, Any]]] = {}  # messages by id of a response
        self.num_requests = 0
        self._policy, self._sampling = policy, sampling
        self._template, self._max_requests = template, max_requests
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        self._errors = ErrorLog(logger)
        self._sent: dict[str, Turn] = {}  # assistant message as sent -> its turn

    @property
    def tokenizer(self) -> Tokenizer:
        return self._policy.tokenizer

    async def complete(self, request: ChatRequest) -> list[Reply]:
        """Returns request.n completions. Raises RequestError."""
        self.num_requests += 1
        if self.num_requests > self._max_requests:
            raise RequestError(
                429,
                f"this episode has made its rollout.agent_max_requests = {self._max_requests} "
                "requests",
                "rate_limit_error",
            )
        if not 1 <= request.n <= MAX_COMPLETIONS:
            raise RequestError(400, f"n = {request.n}, must be 1 to {MAX_COMPLETIONS}")
        text, ids, parent = self._input(request)
        sampling = self._sampling_of(request, len(ids))
        turns = [self._generate(text, ids, parent, sampling) for _ in range(request.n)]
        return [self._reply(turn, request) for turn in await asyncio.gather(*turns)]

    # ---- inside

    def _input(self, request: ChatRequest) -> tuple[str, list[int], Turn | None]:
        """Returns text and ids of the prompt, and the turn that it continues."""
        if isinstance(request.prompt, list):
            ids = request.prompt
            return self.tokenizer.decode_all(ids), ids, None
        text = request.prompt if request.prompt is not None else self._render(request)
        if parent := self.transcript.continued(text):
            added = self.tokenizer.encode(text[len(parent.text) :]).tolist()
            return text, parent.ids + added, parent
        if request.prompt is None:
            self._log_break(text, request)
        add_bos = self._template.add_bos if request.prompt is not None else False
        return text, self.tokenizer.encode(text, add_bos).tolist(), None

    def _render(self, request: ChatRequest, count: int | None = None) -> str:
        """Renders the messages; those that this session has sent with exactly their sampled text.

        With `count`, renders the first messages only, without the start of a response.
        """
        messages = [self._as_sampled(message) for message in request.messages[:count]]
        variables = self._template.variables | ({"tools": request.tools} if request.tools else {})
        if count is not None:
            variables = variables | {"add_generation_prompt": False}
        try:
            return self.tokenizer.render_chat(messages, self._template.name, variables)
        except DataError as e:
            raise RequestError(400, str(e)) from None

    def _as_sampled(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("role") != "assistant":
            return message
        turn = self._sent.get(_sent_key(message.get("content"), message.get("tool_calls")))
        return {"role": "assistant", "content": turn.raw} if turn else message

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

    async def _generate(
        self, text: str, ids: list[int], parent: Turn | None, sampling: Sampling
    ) -> Turn:
        is_leaf = parent is not None and not parent.num_children
        if self.transcript.num_sequences >= MAX_SEQUENCES and not is_leaf:
            raise RequestError(
                429, f"this episode has {MAX_SEQUENCES} branches already", "rate_limit_error"
            )
        async with self._slots:
            try:
                completion = await self._policy.generate(ids, sampling)
            except EngineError as e:
                self.error = e
                raise RequestError(503, f"the server failed: {e}", "api_error") from None
            except DataError as e:
                raise RequestError(400, str(e)) from None
        if not completion.ids:
            raise RequestError(
                400,
                f"the prompt has {len(ids)} tokens, which leaves no room in model.context_tokens",
            )
        sampled, end = completion.ids, None
        if completion.stop == "stop" and sampled[-1] in sampling.stop_token_ids:
            sampled, end = sampled[:-1], sampled[-1:]
        raw = self.tokenizer.decode_all(sampled)
        ended = self.tokenizer.decode_all(end) if end else ""
        turn = Turn(text + raw + ended, [*ids, *completion.ids], completion, parent, raw=raw)
        self.transcript.add(turn)
        return turn

    def _reply(self, turn: Turn, request: ChatRequest) -> Reply:
        content, stop_text = turn.raw, None
        for stop in request.stop:
            if turn.completion.stop == "stop" and content.endswith(stop):
                content, stop_text = content.removesuffix(stop), stop
        content, calls = tool_calls.parse(content) if request.tools else (content, [])
        self._sent[_sent_key(content, [call.as_openai() for call in calls])] = turn
        finish: FinishReason = "tool_calls" if calls else turn.completion.stop
        segments = turn.completion.segments
        logprobs = [logprob for segment in segments for logprob in segment.logprobs]
        return Reply(
            content, calls, finish, turn.completion.ids, logprobs, turn.num_prompt, stop_text
        )

    def _log_break(self, text: str, request: ChatRequest) -> None:
        """Names the message and the first token in which a request leaves what was sampled."""
        found = self.transcript.nearest_break(text)
        if found is None or not any(m.get("role") == "assistant" for m in request.messages):
            return
        number = next(
            (n for n in range(len(request.messages)) if self._reaches(request, n, found.offset)),
            len(request.messages) - 1,
        )
        old, new = (
            self.tokenizer.decode_all(self.tokenizer.encode(whole[found.offset :])[:1].tolist())
            for whole in (found.turn.text, text)
        )
        self._errors.log(
            f"message {number} ({request.messages[number].get('role')}) does not continue the "
            "episode, so it starts another training sequence",
            f"the first token that differs is {new!r}, was {old!r}",
        )

    def _reaches(self, request: ChatRequest, number: int, offset: int) -> bool:
        """Tells whether the text of the messages up to `number` is longer than `offset`."""
        try:
            return len(self._render(request, number + 1)) > offset
        except RequestError:  # some templates reject a part of a conversation
            return False


def _sent_key(content: Any, calls: Any) -> str:
    """Returns what identifies an assistant message; clients may add fields of their own."""
    calls = [(c.get("id"), c.get("function", {}).get("name")) for c in calls or []]
    return json.dumps([content or "", calls])
