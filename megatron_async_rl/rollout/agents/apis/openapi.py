"""The OpenAPI description of the endpoints, served without a key at /openapi.json.

It names the fields that are read; others are accepted and ignored.
"""

from __future__ import annotations

from typing import Any

from megatron_async_rl.protocol.types import MAX_REWARD
from megatron_async_rl.rollout.agents.session import MAX_COMPLETIONS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_COUNT: Schema = {"type": ["integer", "null"], "minimum": 1}
_NUM_COMPLETIONS: Schema = {"type": "integer", "minimum": 1, "maximum": MAX_COMPLETIONS}
_STOP: Schema = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16},
        {"type": "null"},
    ]
}


def _object(required: str = "", **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required.split()}


def _list(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def _one_of(*values: str | None) -> Schema:
    return {"enum": [*values]}


def _any_of(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas]}


_PARTS = _list(_object("text", type=_one_of("text"), text=_TEXT))
_PYTHON = _object("type", type=_one_of("python"))
_PARAMETERS = _object(type=_one_of("object"))
_FUNCTION = _object("name", name=_TEXT, description=_TEXT, parameters=_PARAMETERS)
_CALL = _object(
    "id function",
    id=_TEXT,
    type=_one_of("function"),
    function=_object("name arguments", name=_TEXT, arguments=_TEXT),
)
_CHOICE = _object(type=_TEXT)

_CHAT = _object(
    "messages",
    messages=_list(
        _object(
            "role content",
            role=_one_of("system", "developer", "user", "assistant", "tool"),
            content=_any_of(_TEXT, _PARTS, {"type": "null"}),
            tool_calls=_list(_CALL),
            tool_call_id=_TEXT,
        ),
        1,
    ),
    tools=_list(
        _any_of(
            _PYTHON,
            _object("type function", type=_one_of("function"), function=_FUNCTION),
        )
    ),
    tool_choice=_any_of(_one_of("auto", "none", "required", None), _CHOICE),
    response_format=_object("type", type=_one_of("text")),
    max_tokens=_COUNT,
    max_completion_tokens=_COUNT,
    stop=_STOP,
    n=_NUM_COMPLETIONS,
    stream=_FLAG,
    stream_options=_object(include_usage=_FLAG),
    logprobs=_FLAG,
)
_COMPLETION = _object(
    "prompt",
    prompt=_any_of(_TEXT, _list({"type": "integer", "minimum": 0})),
    max_tokens=_COUNT,
    stop=_STOP,
    n=_NUM_COMPLETIONS,
    stream=_FLAG,
    logprobs={"type": ["integer", "null"]},
)
_INPUT_PARTS = _list(_object("type text", type=_one_of("input_text", "output_text"), text=_TEXT))
_RESPONSE = _object(
    "input",
    input=_any_of(
        _TEXT,
        _list(
            _any_of(
                _object("role content", role=_TEXT, content=_any_of(_TEXT, _INPUT_PARTS)),
                _object(
                    "type call_id name arguments",
                    type=_one_of("function_call"),
                    call_id=_TEXT,
                    name=_TEXT,
                    arguments=_TEXT,
                ),
                _object(
                    "type call_id output",
                    type=_one_of("function_call_output"),
                    call_id=_TEXT,
                    output=_TEXT,
                ),
            ),
            1,
        ),
    ),
    instructions={"type": ["string", "null"]},
    previous_response_id={"type": ["string", "null"]},
    tools=_list(
        _any_of(
            _PYTHON,
            _object("type name", type=_one_of("function"), name=_TEXT, parameters=_PARAMETERS),
        )
    ),
    tool_choice=_any_of(_one_of("auto", "none", "required", None), _CHOICE),
    max_output_tokens=_COUNT,
    stream=_FLAG,
)
_BLOCKS = _list(
    _any_of(
        _object("type text", type=_one_of("text"), text=_TEXT),
        _object(
            "type id name input", type=_one_of("tool_use"), id=_TEXT, name=_TEXT, input=_object()
        ),
        _object(
            "type tool_use_id",
            type=_one_of("tool_result"),
            tool_use_id=_TEXT,
            content=_any_of(_TEXT, _PARTS),
        ),
    ),
    1,
)
_MESSAGES = _object(
    "messages",
    messages=_list(
        _object("role content", role=_one_of("user", "assistant"), content=_any_of(_TEXT, _BLOCKS)),
        1,
    ),
    system=_any_of(_TEXT, _PARTS),
    tools=_list(
        _any_of(_PYTHON, _object("name input_schema", name=_TEXT, input_schema=_PARAMETERS))
    ),
    tool_choice=_object("type", type=_one_of("auto", "none", "any", "tool")),
    max_tokens=_COUNT,
    stop_sequences=_STOP,
    stream=_FLAG,
)
_REWARD = _object(
    "reward",
    reward={"type": "number", "minimum": -MAX_REWARD, "maximum": MAX_REWARD},
    turn={"type": ["integer", "null"], "minimum": 0},
)

_NUMBER: Schema = {"type": "integer", "minimum": 0}
_USAGE = _object(
    "prompt_tokens completion_tokens total_tokens",
    prompt_tokens=_NUMBER,
    completion_tokens=_NUMBER,
    total_tokens=_NUMBER,
)
_FINISH = _one_of("stop", "length", "tool_calls")
_REPLY = _object(
    "role content",
    role=_one_of("assistant"),
    content={"type": ["string", "null"]},
    tool_calls=_list(_CALL),
)
_CHAT_REPLY = _object(
    "id object model choices usage",
    choices=_list(_object("index message finish_reason", message=_REPLY, finish_reason=_FINISH), 1),
    usage=_USAGE,
)
_COMPLETION_REPLY = _object(
    "id object model choices usage",
    choices=_list(_object("index text finish_reason", text=_TEXT, finish_reason=_FINISH), 1),
    usage=_USAGE,
)
_RESPONSE_REPLY = _object(
    "id object model status output usage",
    id=_TEXT,
    status=_one_of("completed", "incomplete"),
    output=_list(_object("type id", type=_one_of("message", "function_call"), id=_TEXT), 1),
)
_MESSAGES_REPLY = _object(
    "id type role model content stop_reason usage",
    type=_one_of("message"),
    content=_list(_object("type", type=_one_of("text", "tool_use")), 1),
    stop_reason=_one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
)
_MODELS = _object("object data", data=_list(_object("id object", id=_TEXT)))
_ERROR = _object("error", error=_object("message type", message=_TEXT, type=_TEXT))

_ERRORS = {
    400: "a field is wrong, or the prompt leaves no room in model.context_tokens",
    401: "the key is unknown, or its episode has ended",
    404: "there is no such path, or no such earlier response",
    413: "the body has more than 16 MiB",
    429: "the episode has made its requests, or has its branches",
    503: "the server or the sandbox failed; the episode ends",
}


def description() -> Schema:
    """Returns the OpenAPI 3.1 description."""
    posts = {
        "/v1/chat/completions": ("OpenAI's chat completions", _CHAT, _CHAT_REPLY),
        "/v1/completions": ("OpenAI's completions", _COMPLETION, _COMPLETION_REPLY),
        "/v1/responses": ("OpenAI's responses", _RESPONSE, _RESPONSE_REPLY),
        "/v1/messages": ("Anthropic's messages", _MESSAGES, _MESSAGES_REPLY),
        "/v1/reward": ("Gives a turn its reward", _REWARD, _object("reward turn")),
    }
    paths: Schema = {
        path: {"post": _operation(summary, reply, body, "stream" in body["properties"])}
        for path, (summary, body, reply) in posts.items()
    }
    paths["/v1/models"] = {"get": _operation("The one model", _MODELS)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Endpoint of agents", "version": "1"},
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        },
        "security": [{"bearer": []}, {"header": []}],
    }


def _operation(
    summary: str, reply: Schema, body: Schema | None = None, may_stream: bool = False
) -> Schema:
    content: Schema = {"application/json": {"schema": reply}}
    if may_stream:
        content["text/event-stream"] = {"schema": {}}
    error = {"application/json": {"schema": _ERROR}}
    responses: Schema = {"200": {"description": "the reply", "content": content}}
    for status, meaning in _ERRORS.items():
        if body or status == 401:
            responses[str(status)] = {"description": meaning, "content": error}
    operation: Schema = {"summary": summary, "responses": responses}
    if body:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": body}},
        }
    return operation
