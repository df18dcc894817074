"""Anthropic's messages API: requests to ChatRequest, replies to its JSON."""

from __future__ import annotations

import json
from typing import Any

from megatron_async_rl.rollout.agents.apis.chat import MODEL, new_id
from megatron_async_rl.rollout.agents.apis.fields import Fields
from megatron_async_rl.rollout.agents.apis.request import PYTHON, ChatRequest, Reply, RequestError


def parse_messages(body: dict[str, Any]) -> ChatRequest:
    """Returns the request of /v1/messages. Raises RequestError."""
    fields = Fields(body)
    messages: list[dict[str, Any]] = []
    if system := body.get("system"):
        text = system if isinstance(system, str) else _texts(fields.objects("system"))
        messages.append({"role": "system", "content": text})
    for message in fields.objects("messages", required=True):
        messages += _messages(Fields(message), message.get("content"))
    choice = body.get("tool_choice") or {"type": "auto"}
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind not in ("auto", "none", "any", "tool"):
        raise RequestError(400, "tool_choice must be of type auto, none, any or tool")
    return ChatRequest(
        messages=messages,
        tools=[] if kind == "none" else [_tool(tool) for tool in fields.objects("tools")],
        max_tokens=fields.integer("max_tokens"),
        stop=fields.texts("stop_sequences"),
        stream=fields.boolean("stream"),
    )


def message(reply: Reply) -> dict[str, Any]:
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": _blocks(reply),
        "stop_reason": _stop_reason(reply),
        "stop_sequence": reply.stop_text,
        "usage": {"input_tokens": reply.num_prompt, "output_tokens": len(reply.ids)},
    }


def events(reply: Reply) -> list[dict[str, Any]]:
    """Returns the events of a streamed reply; each block is one delta."""
    whole = message(reply)
    start = whole | {"content": [], "stop_reason": None, "stop_sequence": None}
    found: list[dict[str, Any]] = [{"type": "message_start", "message": start}]
    for index, block in enumerate(whole["content"]):
        if block["type"] == "text":
            empty, delta = block | {"text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            written = json.dumps(block["input"])
            empty = block | {"input": {}}
            delta = {"type": "input_json_delta", "partial_json": written}
        found += [
            {"type": "content_block_start", "index": index, "content_block": empty},
            {"type": "content_block_delta", "index": index, "delta": delta},
            {"type": "content_block_stop", "index": index},
        ]
    ended = {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    found.append({"type": "message_delta", "delta": ended, "usage": whole["usage"]})
    return [*found, {"type": "message_stop"}]


def _messages(fields: Fields, content: Any) -> list[dict[str, Any]]:
    """Returns one message for chat templates, or one per tool result in it and one for the rest."""
    role = fields.text("role")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks, calls, texts = fields.objects("content", required=True), [], []
    results: list[dict[str, Any]] = []
    for block in blocks:
        reader = Fields(block)
        match block.get("type"):
            case "text":
                texts.append(reader.text("text"))
            case "tool_use":
                function = {"name": reader.text("name"), "arguments": reader.json_object("input")}
                calls.append({"id": reader.text("id"), "type": "function", "function": function})
            case "tool_result":
                inner = block.get("content") or ""
                text = inner if isinstance(inner, str) else _texts(reader.objects("content"))
                call_id = reader.text("tool_use_id")
                results.append({"role": "tool", "content": text, "tool_call_id": call_id})
            case kind:
                raise RequestError(400, f"content blocks of type {kind!r} are not supported")
    rest: dict[str, Any] = {"role": role, "content": "".join(texts)}
    if calls:
        rest["tool_calls"] = calls
    return [*results, *([rest] if texts or calls else [])]


def _texts(blocks: list[dict[str, Any]]) -> str:
    return "".join(Fields(block).text("text") for block in blocks)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Returns a tool in OpenAI's form, which chat templates take."""
    if tool.get("type") == PYTHON["type"]:
        return PYTHON
    fields = Fields(tool)
    function = {
        "name": fields.text("name"),
        "description": tool.get("description", ""),
        "parameters": fields.object("input_schema"),
    }
    return {"type": "function", "function": function}


def _blocks(reply: Reply) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if reply.content or not reply.calls:
        blocks.append({"type": "text", "text": reply.content})
    for call in reply.calls:
        blocks.append(
            {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments}
        )
    return blocks


def _stop_reason(reply: Reply) -> str:
    if reply.calls:
        return "tool_use"
    if reply.stop_text is not None:
        return "stop_sequence"
    return "end_turn" if reply.finish == "stop" else "max_tokens"
