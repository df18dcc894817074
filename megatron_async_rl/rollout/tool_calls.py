"""Finds tool calls in sampled text: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

This is the form of Hermes' and of Qwen's chat templates. Agents (agents/session.py) and the
workflow python_tool read calls here.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any, NoReturn

_CLOSING = "</tool_call>"
_CALL = re.compile(rf"<tool_call>(.*?){_CLOSING}", re.DOTALL)
FORM = '{"name": "...", "arguments": {...}}'


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: dict[str, Any]

    def as_openai(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": json.dumps(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class BadCall:
    """An invalid text between the tags of a call."""

    error: str


def find(text: str) -> list[ToolCall | BadCall]:
    """Returns the texts between the tags of calls, in order."""
    return [_read(match[1]) for match in _CALL.finditer(_closed(text)[0])]


def split(text: str) -> tuple[str, list[ToolCall]]:
    """Returns the text without the calls in it, and the calls. A bad call stays in the text."""
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        call = _read(match[1])
        if isinstance(call, BadCall):
            return match[0]
        calls.append(call)
        return ""

    closed, rest = _closed(text)
    content = _CALL.sub(take, closed) + rest
    return (content.strip() if calls else text), calls


def _closed(text: str) -> tuple[str, str]:
    """Returns the text up to the last end of a call, and the rest: a search for an end that does
    not come would take the square of the number of beginnings."""
    before, closing, after = text.rpartition(_CLOSING)
    return before + closing, after


def _refuse_constant(name: str) -> NoReturn:
    """Clients in other languages cannot read NaN and Infinity."""
    raise ValueError(f"{name} is not JSON")


def _read(text: str) -> ToolCall | BadCall:
    try:
        # newlines in a text need no escape
        call = json.loads(text, strict=False, parse_constant=_refuse_constant)
        name, arguments = call["name"], call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments, strict=False, parse_constant=_refuse_constant)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise TypeError("the name is not a text, or the arguments are not an object")
        json.dumps([name, arguments], ensure_ascii=False).encode()  # no half of a surrogate pair
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        return BadCall(f"error: a call is JSON of the form {FORM} ({type(e).__name__}: {e})")
    return ToolCall(f"call_{secrets.token_hex(12)}", name, arguments)
