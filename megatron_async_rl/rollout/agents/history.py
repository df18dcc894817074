"""Finds the exact tokens of a request's messages: sampled tokens return as they were sampled.

A client returns a reply as a message, with the text and the tool calls that were read from it. The
history puts the sampled text in its place before it renders the chat, so that the rendering begins
with the text of an earlier turn; the ids of that turn are used unchanged (transcript.py).
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_async_rl.config.datasets import DataConfig
from megatron_async_rl.data.chat_template import PYTHON_TOOL
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.error_log import ErrorLog
from megatron_async_rl.rollout.agents.apis.request import PYTHON, ChatRequest, RequestError
from megatron_async_rl.rollout.agents.transcript import Transcript, Turn

LONG_TEXT = 1 << 16  # characters; longer texts are tokenized in a thread
BREAK_CHARS = 200  # of which the first token is logged

Message = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A prompt in the transcript: its text, its ids, and the turn that it continues."""

    text: str
    ids: list[int]
    parent: Turn | None


class History:
    """`breaks` logs the requests that do not continue the episode."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: DataConfig,
        transcript: Transcript,
        breaks: ErrorLog,
    ) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._transcript, self._breaks = transcript, breaks
        self._sampled: dict[str, str] = {}  # a reply as sent -> its text as sampled
        # a conversation up to a reply -> the messages that stand for the reply: turns that call
        # `python`, the outputs, and the last turn
        self._replaced: dict[str, list[Message]] = {}

    async def place(self, request: ChatRequest) -> Place:
        """Raises RequestError if the chat template rejects the messages."""
        if isinstance(request.prompt, list):
            limit = self._tokenizer.vocab_size
            if not all(0 <= token < limit for token in request.prompt):
                raise RequestError(400, f"prompt has a token that is not from 0 to {limit - 1}")
            return Place(self._tokenizer.decode_all(request.prompt), request.prompt, None)
        text = request.prompt if request.prompt is not None else self._render(request)
        if parent := self._transcript.continued(text):
            return Place(text, parent.ids + await self._encode(text[len(parent.text) :]), parent)
        if request.prompt is None:
            self._log_break(text, request)
        add_bos = self._data.add_bos if request.prompt is not None else False
        return Place(text, await self._encode(text, add_bos), None)

    def remember(self, request: ChatRequest, reply: Message, sampled: list[Message]) -> None:
        """Keeps the messages that stand for a reply, for requests that continue it."""
        if len(sampled) > 1:
            *_, key = _conversation_keys([*request.messages, reply])
            self._replaced[key] = sampled
        else:
            self._sampled[_reply_key(reply)] = sampled[0]["content"]

    # ---- inside

    async def _encode(self, text: str, add_bos: bool | None = False) -> list[int]:
        if len(text) < LONG_TEXT:
            return self._tokenizer.encode(text, add_bos).tolist()
        return (await asyncio.to_thread(self._tokenizer.encode, text, add_bos)).tolist()

    def _render(self, request: ChatRequest, count: int | None = None) -> str:
        """With `count`, renders the first messages only, without the start of a response."""
        variables = self._data.chat_template_kwargs
        if request.tools:
            tools = [PYTHON_TOOL if tool == PYTHON else tool for tool in request.tools]
            variables = variables | {"tools": tools}
        if count is not None:
            variables = variables | {"add_generation_prompt": False}
        messages = self._as_sampled(request.messages[:count])
        try:
            return self._tokenizer.render_chat(messages, self._data.chat_template_name, variables)
        except DataError as e:
            raise RequestError(400, str(e)) from None

    def _as_sampled(self, messages: list[Message]) -> list[Message]:
        """Returns the messages with those of this session's replies exactly as sampled."""
        found: list[Message] = []
        keys = _conversation_keys(messages) if self._replaced else itertools.repeat("")
        for message, key in zip(messages, keys, strict=False):
            replacing = self._replaced.get(key) if message.get("role") == "assistant" else None
            if replacing is None and message.get("role") == "assistant":
                raw = self._sampled.get(_reply_key(message))
                replacing = None if raw is None else [{"role": "assistant", "content": raw}]
            found += [message] if replacing is None else replacing
        return found

    def _log_break(self, text: str, request: ChatRequest) -> None:
        """Logs the message and the first token in which a request differs from the sampled text."""
        found = self._transcript.nearest(text)
        if found is None or not any(m.get("role") == "assistant" for m in request.messages):
            return
        turn, offset = found
        last = len(request.messages) - 1
        number = bisect.bisect_left(
            range(last), True, key=lambda n: self._reaches(request, n, offset)
        )
        old, new = (
            self._tokenizer.decode_all(self._tokenizer.encode(rest)[:1].tolist())
            for rest in (whole[offset:][:BREAK_CHARS] for whole in (turn.text, text))
        )
        found_there = (
            f"the first token that differs is {new!r}" if new else "the request ends there"
        )
        self._breaks.log(
            f"message {number} ({request.messages[number].get('role')}) does not continue the "
            "episode, so it starts another training sequence",
            f"{found_there}, was {old!r}",
        )

    def _reaches(self, request: ChatRequest, number: int, offset: int) -> bool:
        """Returns whether the text of the messages up to `number` is longer than `offset`."""
        try:
            return len(self._render(request, number + 1)) > offset
        except RequestError:  # some templates reject a part of a conversation
            return False


def _reply_key(message: Message) -> str:
    """Returns the identity of an assistant message; clients may add fields of their own."""
    calls = [
        (call.get("id"), call.get("function", {}).get("name"))
        for call in message.get("tool_calls") or []
    ]
    return json.dumps([message.get("content") or "", calls])


def _conversation_keys(messages: list[Message]) -> Iterator[str]:
    """Yields the identity of each message with all before it, in one pass over their text."""
    digest = hashlib.sha256()
    for message in messages:
        part = [message.get("role"), message.get("tool_call_id"), _reply_key(message)]
        digest.update(json.dumps(part).encode())
        yield digest.hexdigest()
