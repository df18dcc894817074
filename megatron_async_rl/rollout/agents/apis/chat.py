"""OpenAI's chat completions and completions: requests to ChatRequest, replies to their JSON.

A streamed reply is made of the finished completion: its text is one chunk, because a weight update
may interrupt a request and the tokens are known to be final only at its end.
"""

from __future__ import annotations

import secrets
from typing import Any

from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.rollout.agents.apis.fields import Fields
from megatron_async_rl.rollout.agents.apis.request import PYTHON, ChatRequest, Reply, RequestError

MODEL = "policy"
CREATED = 0  # a time that clients show and decide nothing by


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Returns the request of /v1/chat/completions. Raises RequestError."""
    fields = Fields(body)
    choice = body.get("tool_choice", "auto")
    if not isinstance(choice, dict) and choice not in ("auto", "none", "required", None):
        raise RequestError(400, "tool_choice must be auto, none, required or an object")
    tools = [_tool(tool) for tool in fields.objects("tools")]
    options = fields.object("stream_options") if body.get("stream_options") else {}
    response_format = body.get("response_format")
    if response_format and fields.object("response_format").get("type") != "text":
        raise RequestError(
            400,
            "response_format is not supported: constrained tokens would be sampled from another "
            "distribution than the one that is trained; ask for the format in the prompt",
        )
    return ChatRequest(
        messages=[_message(message) for message in fields.objects("messages", required=True)],
        tools=[] if choice == "none" else tools,
        max_tokens=fields.integer("max_completion_tokens", fields.integer("max_tokens")),
        stop=fields.texts("stop"),
        n=fields.count("n"),
        stream=fields.boolean("stream"),
        stream_usage=Fields(options).boolean("include_usage"),
        logprobs=fields.boolean("logprobs"),
    )


def parse_completion(body: dict[str, Any]) -> ChatRequest:
    """Returns the request of /v1/completions. Raises RequestError."""
    fields = Fields(body)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not isinstance(prompt, str) and not is_ids:
        raise RequestError(400, "prompt must be a string or a list of token ids")
    return ChatRequest(
        prompt=prompt,
        max_tokens=fields.integer("max_tokens", 16),
        stop=fields.texts("stop"),
        n=fields.count("n"),
        stream=fields.boolean("stream"),
        logprobs=body.get("logprobs") is not None,
    )


def chat_completion(
    request: ChatRequest, replies: list[Reply], tokenizer: Tokenizer
) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", **_content(reply)},
            "finish_reason": reply.finish,
            "logprobs": _logprobs(reply, tokenizer) if request.logprobs else None,
        }
        for index, reply in enumerate(replies)
    ]
    return {**_head("chatcmpl", "chat.completion"), "choices": choices, "usage": usage(replies)}


def chat_chunks(
    request: ChatRequest, replies: list[Reply], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Returns the events of a streamed reply, without the final `[DONE]`."""
    head, chunks = _head("chatcmpl", "chat.completion.chunk"), []
    for index, reply in enumerate(replies):
        delta = {"role": "assistant", **_content(reply)}
        for number, call in enumerate(delta.get("tool_calls", [])):
            call["index"] = number
        logprobs = _logprobs(reply, tokenizer) if request.logprobs else None
        for part, finish in ((delta, None), ({}, reply.finish)):
            choice = {"index": index, "delta": part, "finish_reason": finish}
            chunks.append({**head, "choices": [choice | {"logprobs": logprobs if part else None}]})
    if request.stream_usage:
        chunks.append({**head, "choices": [], "usage": usage(replies)})
    return chunks


def completion(request: ChatRequest, replies: list[Reply], tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the reply of /v1/completions; also its only chunk if it is streamed."""
    choices = [
        {
            "index": index,
            "text": reply.content,
            "finish_reason": reply.finish,
            "logprobs": {
                "tokens": [tokenizer.decode_all([token]) for token in reply.ids],
                "token_logprobs": reply.logprobs,
            }
            if request.logprobs
            else None,
        }
        for index, reply in enumerate(replies)
    ]
    return {**_head("cmpl", "text_completion"), "choices": choices, "usage": usage(replies)}


def usage(replies: list[Reply]) -> dict[str, int]:
    prompt, sampled = replies[0].num_prompt, sum(len(reply.ids) for reply in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message for chat templates: text parts joined, arguments of calls as objects."""
    fields = Fields(message)
    role = fields.text("role")
    role = "system" if role == "developer" else role
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(map(_text_of, fields.objects("content")))
    elif content is not None and not isinstance(content, str):
        raise RequestError(400, "content of a message must be a string or a list of text parts")
    kept: dict[str, Any] = {"role": role, "content": content or ""}
    if calls := fields.objects("tool_calls"):
        kept["tool_calls"] = [_tool_call(call) for call in calls]
    for name in ("tool_call_id", "name"):
        if isinstance(message.get(name), str):
            kept[name] = message[name]
    return kept


def _text_of(part: dict[str, Any]) -> str:
    if "text" not in part:  # its type is `text`, or another one in /v1/responses
        kind = part.get("type")
        raise RequestError(400, f"content parts of type {kind!r} are not supported, text only")
    return Fields(part).text("text")


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") == PYTHON["type"]:
        return PYTHON
    Fields(Fields(tool).object("function")).text("name")
    return tool


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = Fields(call).object("function")
    arguments = Fields(function).json_object("arguments")
    return {**call, "function": {"name": Fields(function).text("name"), "arguments": arguments}}


def _content(reply: Reply) -> dict[str, Any]:
    if not reply.calls:
        return {"content": reply.content}
    calls = [call.as_openai() for call in reply.calls]
    return {"content": reply.content or None, "tool_calls": calls}


def _logprobs(reply: Reply, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = [tokenizer.decode_all([token]) for token in reply.ids]
    content = [
        {"token": t, "logprob": logprob, "bytes": list(t.encode()), "top_logprobs": []}
        for t, logprob in zip(tokens, reply.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _head(prefix: str, kind: str) -> dict[str, Any]:
    return {"id": new_id(prefix), "object": kind, "created": CREATED, "model": MODEL}


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"
