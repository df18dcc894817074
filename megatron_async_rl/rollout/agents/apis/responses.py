"""The common part of OpenAI's responses API: text in and out, function tools, earlier responses."""

from __future__ import annotations

from typing import Any

from megatron_async_rl.rollout.agents.apis import chat
from megatron_async_rl.rollout.agents.apis.fields import Fields
from megatron_async_rl.rollout.agents.apis.request import PYTHON, ChatRequest, Reply, RequestError
from megatron_async_rl.rollout.agents.session import Session


def parse(body: dict[str, Any], session: Session) -> ChatRequest:
    """Returns the request of /v1/responses. Raises RequestError."""
    fields, messages = Fields(body), []
    if body.get("instructions"):
        messages.append({"role": "system", "content": fields.text("instructions")})
    if body.get("previous_response_id"):
        previous = fields.text("previous_response_id")
        if previous not in session.earlier:
            raise RequestError(404, f"previous_response_id = {previous!r} is not of this session")
        messages += session.earlier[previous]
    given = body.get("input")
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    else:
        messages += _messages(fields.objects("input", required=True))
    tools = [_tool(tool) for tool in fields.objects("tools")]
    return chat.parse_chat(
        {
            "messages": messages,
            "tools": tools,
            "tool_choice": body.get("tool_choice", "auto"),
            "max_tokens": body.get("max_output_tokens"),
            "stream": body.get("stream", False),
        }
    )


def response(
    body: dict[str, Any], request: ChatRequest, reply: Reply, session: Session
) -> dict[str, Any]:
    """Returns the reply to `body`; the session keeps its conversation for `previous_response_id`.

    The instructions are not part of it: the next request may bring others.
    """
    identity = chat.new_id("resp")
    kept = request.messages[1:] if body.get("instructions") else request.messages
    session.earlier[identity] = [*kept, reply.as_message()]
    output: list[dict[str, Any]] = []
    if reply.content or not reply.calls:
        text = {"type": "output_text", "text": reply.content, "annotations": []}
        output.append(
            {
                "type": "message",
                "id": chat.new_id("msg"),
                "role": "assistant",
                "status": "completed",
                "content": [text],
            }
        )
    for call in reply.calls:
        function = call.as_openai()["function"]
        output.append({"type": "function_call", "id": call.id, "call_id": call.id, **function})
    used = chat.usage([reply])
    return {
        "id": identity,
        "object": "response",
        "created_at": chat.CREATED,
        "model": chat.MODEL,
        "status": "completed" if reply.finish != "length" else "incomplete",
        "incomplete_details": {"reason": "max_output_tokens"} if reply.finish == "length" else None,
        "error": None,
        "instructions": None,
        "metadata": {},
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": used["prompt_tokens"],
            "output_tokens": used["completion_tokens"],
            "total_tokens": used["total_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }


def events(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the events of a streamed reply: each text and each call begins empty, and has one
    delta."""
    empty = whole | {"output": [], "status": "in_progress", "incomplete_details": None}
    found: list[dict[str, Any]] = [{"type": "response.created", "response": empty}]
    for index, item in enumerate(whole["output"]):
        place = {"item_id": item["id"], "output_index": index}
        emptied: dict[str, Any] = {"content": []} if "content" in item else {"arguments": ""}
        begun = item | emptied | {"status": "in_progress"}
        found.append({"type": "response.output_item.added", "output_index": index, "item": begun})
        if item["type"] == "message":
            [part] = item["content"]
            text, place = part["text"], place | {"content_index": 0}
            found += [
                {"type": "response.content_part.added", **place, "part": part | {"text": ""}},
                {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []},
                {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
                {"type": "response.content_part.done", **place, "part": part},
            ]
        else:
            kind, written = "response.function_call_arguments", item["arguments"]
            found += [
                {"type": f"{kind}.delta", **place, "delta": written},
                {"type": f"{kind}.done", **place, "name": item["name"], "arguments": written},
            ]
        found.append({"type": "response.output_item.done", "output_index": index, "item": item})
    kind = "response.completed" if whole["status"] == "completed" else "response.incomplete"
    found.append({"type": kind, "response": whole})
    return [event | {"sequence_number": number} for number, event in enumerate(found)]


def _messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns chat messages; the text and the calls of one reply are items, but one message."""
    messages: list[dict[str, Any]] = []
    for message in map(_message, items):
        if "tool_calls" in message and messages and messages[-1]["role"] == "assistant":
            calls = [*messages[-1].get("tool_calls", []), *message["tool_calls"]]
            messages[-1] = messages[-1] | {"tool_calls": calls}
        else:
            messages.append(message)
    return messages


def _message(item: dict[str, Any]) -> dict[str, Any]:
    """Returns an input item as a chat message."""
    fields = Fields(item)
    match item.get("type", "message"):
        case "function_call":
            function = {"name": fields.text("name"), "arguments": fields.json_object("arguments")}
            call = {"id": fields.text("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            call_id = fields.text("call_id")
            return {"role": "tool", "content": fields.text("output"), "tool_call_id": call_id}
        case "message":
            return {"role": fields.text("role"), "content": item.get("content")}
        case kind:
            raise RequestError(400, f"input items of type {kind!r} are not supported")


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(tool)
    if tool.get("type") == PYTHON["type"]:
        return PYTHON
    if tool.get("type") != "function":
        raise RequestError(400, f"tools of type {tool.get('type')!r} are not supported")
    parameters = tool.get("parameters") or {"type": "object", "properties": {}}
    description = tool.get("description") or ""
    function = {"name": fields.text("name"), "description": description, "parameters": parameters}
    return {"type": "function", "function": function}
