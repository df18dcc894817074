"""Finds tool calls in sampled text: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

This is the form of Hermes and of Qwen's chat templates. Text that is not of this form stays
content, so that a malformed call is seen by the agent instead of vanishing.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: dict[str, Any]

    def as_openai(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": json.dumps(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def parse(text: str) -> tuple[str, list[ToolCall]]:
    """Returns the text without the tool calls in it, and the calls."""
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        try:
            value = json.loads(match[1])
            name, arguments = value["name"], value.get("arguments", {})
        except (ValueError, KeyError, TypeError):
            return match[0]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return match[0]
        calls.append(ToolCall(f"call_{secrets.token_hex(12)}", name, arguments))
        return ""

    content = _CALL.sub(take, text)
    return (content.strip() if calls else text), calls
