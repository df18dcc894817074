"""Types that all APIs share: a request in OpenAI's terms, its replies, and its errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_async_rl.rollout.tool_calls import ToolCall

PYTHON = {"type": "python"}  # the tool that runs in the code sandbox, as a request declares it


class RequestError(Exception):
    """A request that is answered with an error. `kind` is the type that the APIs name."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


@dataclass(frozen=True)
class ChatRequest:
    """`tools`: functions of the client in OpenAI's form, and PYTHON.

    `prompt`: a completion without messages.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    prompt: str | list[int] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    stream_usage: bool = False  # in a chunk of its own, without choices
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.runs_python and any(
            tool.get("function", {}).get("name") == "python" for tool in self.tools
        ):
            raise RequestError(
                400, "tools has a function named python beside the tool of type python"
            )

    @property
    def runs_python(self) -> bool:
        return PYTHON in self.tools


FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Reply:
    """One completion: the text and calls for the client, and its tokens."""

    content: str
    calls: list[ToolCall]
    finish: FinishReason
    ids: list[int]
    logprobs: list[float]
    num_prompt: int
    stop_text: str | None = None  # of `stop`, if it ended the completion

    def as_message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.calls:
            message["tool_calls"] = [call.as_openai() for call in self.calls]
        return message
