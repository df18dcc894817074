"""Sessions of agents: exact tokens over turns and branches; the APIs with their real clients."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import psutil
import pytest
from agent_endpoint import ScriptedPolicy, Served, serving
from char_tokenizer import make_chat_folder
from config_builders import config_tree
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megatron_async_rl.config import load
from megatron_async_rl.config.sections import SandboxConfig
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import EngineError, HookFailed
from megatron_async_rl.protocol.types import Prompt, Sample
from megatron_async_rl.rollout.agents.client import ClientSettings
from megatron_async_rl.rollout.agents.runner import CommandRunner, FunctionRunner
from megatron_async_rl.rollout.agents.workflow import AgentWorkflow
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.sandbox.sandbox import SandboxError

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_chat_folder(tmp_path_factory.mktemp("model")))


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def call_of(depth: int) -> dict[str, Any]:
    """Returns a call of a tool whose arguments are nested."""
    arguments = '{"a": ' + "[" * depth + "]" * depth + "}"
    return {"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments}


def trained_text(tokenizer: Tokenizer, sample: Sample, part: slice) -> str:
    """Returns the sequence's text with its trained tokens in capitals."""
    ids, versions = sample.ids[part].tolist(), sample.versions[part]
    words = [tokenizer.decode_all([token]) for token in ids]
    return "".join(w.upper() if v >= 0 else w for w, v in zip(words, versions, strict=True))


def test_turns_of_a_conversation_are_one_sequence_of_the_sampled_ids(tokenizer: Tokenizer) -> None:
    async def converse() -> None:
        async with serving(tokenizer, "four", "sorry, five") as served:
            messages: list[Any] = [user("2+3")]
            first = await served.chat(messages)
            assert first.choices[0].message.content == "four"
            assert first.choices[0].finish_reason == "stop"
            assert first.usage.completion_tokens == 5
            messages += [first.choices[0].message, user("wrong")]
            second = await served.chat(messages, logprobs=True)
            assert len(second.choices[0].logprobs.content) == 12
            sample = served.sample()
            [part] = sample.sequences()
            assert trained_text(tokenizer, sample, part) == (
                "<|user|>2+3<|end|><|assistant|>FOUR<|END|><|user|>wrong<|end|><|assistant|>"
                "SORRY, FIVE<|END|>"
            )
            assert sample.versions[sample.generated].tolist()[:5] == [7, 7, 8, 8, 9]
            assert (sample.logprobs[sample.generated] == -0.5).all()
            assert served.policy.asked[1] == sample.ids[: len(served.policy.asked[1])].tolist()
            assert sample.text == "four\n\nsorry, five"

    asyncio.run(converse())


def test_rewritten_history_is_a_branch_and_shared_turns_are_trained_once(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async def branch() -> None:
        async with serving(tokenizer, "one", "two", "three", "four") as served:
            first = [user("a")]
            answer = {"role": "assistant", "content": "one"}
            await served.chat(first)
            await served.chat([*first, answer, user("b")])
            await served.chat([*first, answer, user("c")])  # a retry with another question
            await served.chat([user("a"), {"role": "assistant", "content": "On"}, user("d")])
            sample = served.sample()
            texts = [trained_text(tokenizer, sample, part) for part in sample.sequences()]
            head = "<|user|>a<|end|><|assistant|>"
            assert texts == [
                f"{head}ONE<|END|><|user|>b<|end|><|assistant|>TWO<|END|>",
                f"{head}one<|end|><|user|>c<|end|><|assistant|>THREE<|END|>",
                f"{head}On<|end|><|user|>d<|end|><|assistant|>FOUR<|END|>",
            ]
            assert sample.num_generated == len("onetwothreefour") + 4

    asyncio.run(branch())
    [record] = [r.getMessage() for r in caplog.records if "does not continue" in r.getMessage()]
    assert "message 1 (assistant)" in record and "'O', was 'o'" in record


def test_tool_calls_come_back_as_they_were_sampled(tokenizer: Tokenizer) -> None:
    call = '<tool_call>{"name":  "add", "arguments": {"b": 1,   "a": 2}}</tool_call>'

    async def call_tool() -> None:
        async with serving(tokenizer, "let me see " + call, "3") as served:
            messages: list[Any] = [user("1+2")]
            first = (await served.chat(messages, tools=TOOLS)).choices[0]
            assert first.finish_reason == "tool_calls"
            [asked] = first.message.tool_calls
            assert json.loads(asked.function.arguments) == {"a": 2, "b": 1}
            assert first.message.content == "let me see"
            result = {"role": "tool", "tool_call_id": asked.id, "content": "3"}
            await served.chat([*messages, first.message, result], tools=TOOLS)
            sample = served.sample()
            [part] = sample.sequences()  # the odd white space of the call is part of the sequence
            assert call in tokenizer.decode_all(sample.ids[part].tolist())

    asyncio.run(call_tool())


def python_call(code: str) -> str:
    return f'<tool_call>{{"name": "python",  "arguments": {{"code": "{code}"}}}}</tool_call>'


def test_python_runs_in_the_sandbox_within_one_request(tokenizer: Tokenizer) -> None:
    """The client sees the last turn; all are one sequence, also after the next request."""

    async def ask() -> None:
        texts = [python_call("print(6*7)"), "it is 42", "bye"]
        async with serving(tokenizer, *texts) as served:
            messages: list[Any] = [user("6*7")]
            first = await served.chat(messages, tools=[{"type": "python"}])
            assert first.choices[0].message.content == "it is 42"
            assert first.choices[0].finish_reason == "stop"
            assert not first.choices[0].message.tool_calls
            messages += [first.choices[0].message, user("thanks")]
            await served.chat(messages, tools=[{"type": "python"}])
            sample = served.sample()
            [part] = sample.sequences()
            assert trained_text(tokenizer, sample, part).partition("6*7")[2] == (
                f"<|end|><|assistant|>{texts[0].upper()}<|END|><|tool|>42<|end|><|assistant|>"
                "IT IS 42<|END|><|user|>thanks<|end|><|assistant|>BYE<|END|>"
            )
            assert served.session.num_requests == 3
            # the same words behind another history are the client's own
            messages[0] = user("7*6")
            await served.chat(messages, tools=[{"type": "python"}])
            assert "print" not in served.session.transcript.turns[-1].text

    asyncio.run(ask())


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_own_tools_are_the_clients_beside_python(tokenizer: Tokenizer, api: str) -> None:
    async def ask() -> None:
        both = python_call("print(1)") + '<tool_call>{"name": "add"}</tool_call>'
        async with serving(tokenizer, both, "two") as served:
            parameters: dict[str, Any] = {"type": "object", "properties": {}}
            result: Any
            if api == "chat":
                messages: list[Any] = [user("a")]
                tools: list[Any] = [{"type": "python"}, *TOOLS]
                message = (await served.chat(messages, tools=tools)).choices[0].message
                [call] = message.tool_calls
                result = {"role": "tool", "tool_call_id": call.id, "content": "3"}
                await served.chat([*messages, message, result], tools=tools)
            elif api == "responses":
                tools = [{"type": "python"}, {"type": "function", "name": "add"}]
                create = served.openai.responses.create
                first = await create(model="policy", input="a", tools=tools)
                [call] = first.output
                result = {"type": "function_call_output", "call_id": call.id, "output": "3"}
                await create(
                    model="policy", input=[result], tools=tools, previous_response_id=first.id
                )
            else:
                messages = [user("a")]
                tools = [{"type": "python"}, {"name": "add", "input_schema": parameters}]
                options: dict[str, Any] = {"model": "policy", "max_tokens": 256, "tools": tools}
                reply = await served.anthropic.messages.create(messages=messages, **options)
                [block] = reply.content
                result = {"type": "tool_result", "tool_use_id": block.id, "content": "3"}
                messages += [{"role": "assistant", "content": reply.content}, user([result])]
                await served.anthropic.messages.create(messages=messages, **options)
            sample = served.sample()
            [part] = sample.sequences()
            text = tokenizer.decode_all(sample.ids[part].tolist())
            assert f"{both}<|end|><|tool|>1<|end|><|tool|>3<|end|><|assistant|>two" in text

    asyncio.run(ask())


def test_call_of_python_that_cannot_be_answered_is_the_end_of_a_reply(
    tokenizer: Tokenizer,
) -> None:
    call = python_call("print('x' * 1500)")

    async def ask() -> None:
        async with serving(tokenizer, *[call] * 9, max_requests=3) as served:
            reply = await served.chat([user("a")], tools=[{"type": "python"}])
            assert reply.choices[0].finish_reason == "length"
            assert reply.choices[0].message.content == call
            assert len(served.session.transcript.turns) == 3
            assert len(served.sample().sequences()) == 1
        async with serving(tokenizer, *[call] * 9) as served:  # 4,096 tokens hold two outputs
            reply = await served.chat([user("a")], tools=[{"type": "python"}])
            assert reply.choices[0].finish_reason == "length"
            assert len(served.session.transcript.turns) == 3

    asyncio.run(ask())


def test_sandbox_that_cannot_start_fails_the_episode(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        settings = SandboxConfig(python="/no/python")
        async with serving(tokenizer, python_call("1"), sandbox=settings) as served:
            with pytest.raises(openai.InternalServerError, match="the sandbox failed"):
                await served.chat([user("a")], tools=[{"type": "python"}])
            assert isinstance(served.session.error, SandboxError)

    asyncio.run(ask())


def test_anthropic_client_converses_with_tools_and_streams(tokenizer: Tokenizer) -> None:
    async def converse() -> None:
        call = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'
        async with serving(tokenizer, call, "three", "bye") as served:
            client = served.anthropic
            tools: list[Any] = [{"name": "add", "input_schema": {"type": "object"}}]
            messages: list[Any] = [user("1+2")]
            options: dict[str, Any] = {"model": "policy", "max_tokens": 64, "tools": tools}
            first = await client.messages.create(messages=messages, system="be kind", **options)
            assert first.stop_reason == "tool_use" and first.content[0].input == {"a": 2}
            result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": "3"}
            messages += [
                {"role": "assistant", "content": first.content},
                {"role": "user", "content": [result]},
            ]
            async with client.messages.stream(
                messages=messages, system="be kind", **options
            ) as stream:
                text = "".join([part async for part in stream.text_stream])
                last = await stream.get_final_message()
            assert text == "three" and last.stop_reason == "end_turn"
            assert len(served.sample().sequences()) == 1

    asyncio.run(converse())


def test_openai_streams_completions_and_responses(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        async with serving(tokenizer, "alpha", "beta stop gamma", "delta", "epsilon") as served:
            client = served.openai
            stream = await served.chat([user("a")], stream=True)
            deltas = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]
            assert "".join(delta or "" for delta in deltas) == "alpha"
            completion = await client.completions.create(model="policy", prompt="x", max_tokens=6)
            assert completion.choices[0].text == "beta s"
            assert completion.choices[0].finish_reason == "length"
            first = await client.responses.create(model="policy", input="c")
            assert first.output_text == "delta"
            second = await client.responses.create(
                model="policy", input="d", previous_response_id=first.id
            )
            assert second.output_text == "epsilon"
            assert len(served.sample().sequences()) == 3  # the responses are one conversation

    asyncio.run(ask())


def test_reply_ends_before_the_stop_text_within_a_token(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        async with serving(tokenizer, "one.\n", "two.\n") as served:
            reply = await served.chat([user("a")], stop=["\n", "."])
            assert reply.choices[0].message.content == "one"
            message = await served.anthropic.messages.create(
                model="policy", max_tokens=9, messages=[user("a")], stop_sequences=["."]
            )
            assert message.content[0].text == "two"
            assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ".")

    asyncio.run(ask())


def test_streams_have_the_events_that_the_openai_client_expects(tokenizer: Tokenizer) -> None:
    """Its helper adds each delta to the item that it has got so far."""
    call = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'
    tools: list[Any] = [{"type": "function", "name": "add", "parameters": {"type": "object"}}]

    async def ask() -> None:
        async with serving(tokenizer, f"so{call}{call}", "done", "alpha", "beta") as served:
            given: list[Any] = [user("2+2")]
            responses = served.openai.responses
            async with responses.stream(model="policy", input=given, tools=tools) as stream:
                events = [event async for event in stream]
                reply = await stream.get_final_response()
            snapshots = [e.snapshot for e in events if e.type.endswith(".delta")]
            assert snapshots == ["so", '{"a": 2}', '{"a": 2}']
            # the items of a reply come back as one message
            given += [item.model_dump() for item in reply.output]
            given += [
                {"type": "function_call_output", "call_id": item.call_id, "output": "4"}
                for item in reply.output[1:]
            ]
            await responses.create(model="policy", input=given, tools=tools)
            assert len(served.sample().sequences()) == 1

            stream = await served.chat([user("a")], stream=True)
            assert [len(chunk.choices) async for chunk in stream] == [1, 1]
            options = {"include_usage": True}
            stream = await served.chat([user("a")], stream=True, stream_options=options)
            *_, last = [chunk async for chunk in stream]
            assert last.choices == [] and last.usage.completion_tokens == 5

    asyncio.run(ask())


def test_framework_that_rewrites_its_history_is_trained_in_branches(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """smolagents returns a tool call as words of its own, not as the message that it got."""
    from framework_agent import calculator

    calls = (
        '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>',
        '<tool_call>{"name": "final_answer", "arguments": {"answer": "five"}}</tool_call>',
    )

    async def run() -> None:
        async with serving(tokenizer, *calls) as served:
            for name, value in served.client_settings().environment().items():
                monkeypatch.setenv(name, value)
            answer = await asyncio.to_thread(calculator(3, 256).run, "2+3")
            assert answer == "five"
            sample = served.sample()
            first, second = (trained_text(tokenizer, sample, p) for p in sample.sequences())
            assert first.endswith(f"<|assistant|>{calls[0].upper()}<|END|>")
            assert "Observation:\n5" in second
            assert second.endswith(f"<|assistant|>{calls[1].upper()}<|END|>")

    asyncio.run(run())
    [record] = [r.getMessage() for r in caplog.records if "does not continue" in r.getMessage()]
    assert "message 2 (assistant)" in record and "'C', was '<'" in record


def test_repeated_request_of_another_history_is_logged_as_one_that_ends_there(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    history = [user("q"), {"role": "assistant", "content": "not sampled"}, user("r")]

    async def ask() -> None:
        async with serving(tokenizer, "a", "b") as served:
            for _ in range(2):
                await served.chat(history)

    asyncio.run(ask())
    [record] = [r.getMessage() for r in caplog.records if "does not continue" in r.getMessage()]
    assert "message 2 (user)" in record and record.endswith("the request ends there, was 'a'")


def test_several_completions_are_branches_of_one_prompt(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        async with serving(tokenizer, "a", "b", "c") as served:
            reply = await served.chat([user("q")], n=3)
            assert [choice.message.content for choice in reply.choices] == ["a", "b", "c"]
            assert served.sample().num_generated == 6
            assert len(served.sample().sequences()) == 3

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("chat/completions", b"{nonsense", 400, "not JSON"),
        ("chat/completions", b"[]", 400, "object"),
        (
            "chat/completions",
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            400,
            "Unic",
        ),
        ("chat/completions", b"{}", 400, "messages"),
        ("chat/completions", {"messages": []}, 400, "empty"),
        ("chat/completions", {"messages": [{"role": 1}]}, 400, "role"),
        ("chat/completions", {"messages": [user("a")], "n": 99}, 400, "n = 99"),
        ("chat/completions", {"messages": [user("a")], "max_tokens": 0}, 400, "max_tokens"),
        ("chat/completions", {"messages": [user("a")], "tool_choice": "any"}, 400, "auto"),
        ("chat/completions", {"messages": [user("a")], "tools": [{"type": "x"}]}, 400, "function"),
        (
            "chat/completions",
            {
                "messages": [user("a")],
                "tools": [{"type": "python"}, {"function": {"name": "python"}}],
            },
            400,
            "beside the tool of type python",
        ),
        ("completions", b'{"prompt": "\xed\xa0\x80"}', 400, "Unicode"),
        (
            "chat/completions",
            {"messages": [user("a")], "response_format": {"type": "json_object"}},
            400,
            "distribution",
        ),
        ("completions", {"prompt": ["a", "b"]}, 400, "prompt"),
        ("completions", {"prompt": []}, 400, "empty"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "image",
        ),
        ("responses", {"input": "a", "previous_response_id": "resp-x"}, 404, "resp-x"),
        ("reward", {"reward": "high"}, 400, "number"),
        ("reward", {"reward": float("inf")}, 400, "finite"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "content parts of type 'image_url' are not supported",
        ),
        ("nothing", {}, 404, "/v1/nothing is not served, only /v1/chat/completions, "),
        ("messages", b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "nested too deeply"),
        ("responses", {"input": [call_of(978)]}, 400, ""),  # read, but too deep for other steps
    ],
)
def test_wrong_request_is_an_error_that_names_the_field(
    tokenizer: Tokenizer, path: str, body: Any, status: int, text: str
) -> None:
    async def ask() -> None:
        async with serving(tokenizer) as served, aiohttp.ClientSession() as http:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Authorization": f"Bearer {served.session.key}"}
            async with http.post(
                f"{served.endpoint.url}/v1/{path}", data=data, headers=headers
            ) as reply:
                error = (await reply.json())["error"]
                assert reply.status == status and text in error["message"], error
            assert not served.session.transcript.turns and not served.session.rewards

    asyncio.run(ask())


def test_wrong_ended_and_foreign_keys_change_nothing(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        async with serving(tokenizer) as served:
            for key in ("", "sk-other", "\u00e9"):
                client = openai.AsyncOpenAI(
                    base_url=f"{served.endpoint.url}/v1", api_key=key or "-", max_retries=0
                )
                with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                    await client.chat.completions.create(model="policy", messages=[user("a")])
            ended = served.openai
            served.endpoint.close(served.session)
            with pytest.raises(openai.AuthenticationError):
                await ended.chat.completions.create(model="policy", messages=[user("a")])
            assert served.policy.asked == []

    asyncio.run(ask())


def raw_request(served: Served, body: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-api-key: {served.session.key}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def send(served: Served, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.endpoint.port)
    writer.write(data)
    return reader, writer


async def count_statuses(reader: asyncio.StreamReader, count: int) -> Counter[bytes]:
    statuses: Counter[bytes] = Counter()
    while statuses.total() < count:
        line = await reader.readline()
        assert line
        statuses.update(re.findall(rb"HTTP/1\.1 (\d+)", line))
    return statuses


def test_flood_of_requests_is_limited_and_other_sessions_continue(tokenizer: Tokenizer) -> None:
    body = json.dumps({"messages": [user("a")], "max_tokens": 1}).encode()

    async def ask() -> None:
        async with serving(tokenizer, max_requests=20) as served:
            other = served.client(served.another())
            flood = [await send(served, raw_request(served, body) * 500) for _ in range(20)]
            counting = [count_statuses(reader, 500) for reader, _ in flood]
            answered = asyncio.gather(*counting)
            reply = await other.chat.completions.create(model="policy", messages=[user("b")])
            assert reply.choices[0].message.content == "ok"
            total = sum(await answered, Counter[bytes]())
            assert total == {b"200": 20, b"429": 9980}
            assert len(served.session.transcript.turns) == 20
            for _, writer in flood:
                writer.close()

    asyncio.run(ask())


def test_failure_of_the_server_fails_the_episode_at_once(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        async with serving(tokenizer) as served:
            served.policy.fails = True
            for _ in range(2):
                with pytest.raises(openai.InternalServerError, match="the server died"):
                    stream = await served.chat([user("a")], stream=True)
                    async for _ in stream:
                        pass
            assert isinstance(served.session.error, EngineError)
            assert len(served.policy.asked) == 1  # the engine is not asked again

    asyncio.run(ask())


def test_megabyte_of_text_is_refused_for_its_length(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        async with serving(tokenizer) as served:
            with pytest.raises(openai.BadRequestError, match="leaves no room"):
                await served.chat([user("x" * (1 << 20))])
            reader, writer = await send(served, raw_request(served, b" " * (17 << 20)))
            assert await count_statuses(reader, 1) == {b"413": 1}
            writer.close()
            assert not served.session.transcript.turns
            assert (await served.chat([user("a")])).choices[0].message.content == "ok"

    asyncio.run(ask())


def test_request_whose_client_has_gone_is_no_turn(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        async with serving(tokenizer) as served:
            served.policy.gate.clear()
            body = json.dumps({"messages": [user("a")]}).encode()
            _, writer = await send(served, raw_request(served, body))
            await wait_until(lambda: len(served.policy.asked) == 1)
            writer.close()
            await wait_until(lambda: served.policy.num_cancelled == 1)
            served.policy.gate.set()
            await served.chat([user("b")])
            [turn] = served.session.transcript.turns
            assert ">b<" in turn.text

    asyncio.run(asyncio.wait_for(ask(), 30))


def test_request_in_flight_at_the_end_of_its_episode_gets_401(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        async with serving(tokenizer) as served:
            served.policy.gate.clear()
            asked = asyncio.create_task(served.chat([user("a")]))
            # a request of which the body has not arrived when the episode ends
            body = json.dumps({"messages": [user("late")]}).encode()
            late = raw_request(served, body)
            reader, writer = await send(served, late[:-5])
            await wait_until(lambda: len(served.policy.asked) == 1)
            served.endpoint.close(served.session)
            with pytest.raises(openai.AuthenticationError, match="has ended"):
                await asked
            writer.write(late[-5:])
            assert await count_statuses(reader, 1) == {b"401": 1}
            writer.close()
            assert not served.session.transcript.turns and len(served.policy.asked) == 1

    asyncio.run(asyncio.wait_for(ask(), 30))


AGENTS = """
import os, sys, threading, time

def good(row, client):
    assert os.environ["OPENAI_API_KEY"] == client.api_key
    print("printed")
    return row["x"] / 2

async def waits(row, client):
    import asyncio
    await asyncio.sleep(0.01)

def raises(row, client):
    raise KeyError("of the agent")

def dies(row, client):
    os.kill(os.getpid(), 9)

def leaves(row, client):
    sys.exit(3)

def wrong(row, client):
    return "high"

def floods(row, client):
    return "x" * (2 << 20)

def ends_its_host(row, client):
    os.kill(os.getppid(), 9)
    time.sleep(1000)

if os.environ.get("HELPER") and not os.fork():  # a process that holds the host's output open
    with open(os.environ["HELPER"], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(30)
    os._exit(0)

def hangs(row, client):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    os.system("sleep 1000 & echo $! > " + row["file"])
    time.sleep(1000)
"""


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agents")
    (folder / "my_agents.py").write_text(AGENTS)
    return folder


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("good", None),
        ("waits", None),
        ("raises", "KeyError: 'of the agent'"),
        ("dies", "signal SIGKILL"),
        ("leaves", "SystemExit: 3"),
        ("wrong", "'high'"),
        ("floods", "more than 1048576 bytes, must be rewards alone"),
    ],
)
def test_agent_runs_in_its_own_process(
    agents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: str | None
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(agents), prepend=":")

    async def run() -> float | None:
        runner = FunctionRunner(f"my_agents:{name}", tmp_path / "agents.log")
        try:
            return await runner.run({"x": 3}, ClientSettings("u", "k", "a", "m"))
        finally:
            await runner.stop()

    if error:
        with pytest.raises(HookFailed, match=error):
            asyncio.run(run())
    else:
        assert asyncio.run(run()) == (1.5 if name == "good" else None)


def test_killed_host_is_seen_while_another_process_holds_its_output(
    agents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(agents), prepend=":")
    monkeypatch.setenv("HELPER", str(tmp_path / "helper"))

    async def run() -> None:
        runner = FunctionRunner("my_agents:ends_its_host", tmp_path / "agents.log")
        with pytest.raises(HookFailed, match="exit code -9"):
            await runner.run({}, ClientSettings("u", "k", "a", "m"))
        file = tmp_path / "helper"
        await wait_until(lambda: file.exists() and bool(file.read_text()))
        helper = psutil.Process(int(file.read_text()))
        assert helper.is_running()
        helper.kill()
        await asyncio.sleep(0.05)  # until asyncio has seen the end of the output

    asyncio.run(asyncio.wait_for(run(), 60))


def test_cancelled_agent_leaves_no_process_and_others_go_on(
    agents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(agents), prepend=":")
    client, file = ClientSettings("u", "k", "a", "m"), tmp_path / "pid"

    def started() -> bool:
        return file.exists() and bool(file.read_text().strip())

    async def run() -> None:
        runner = FunctionRunner("my_agents:hangs", tmp_path / "agents.log")
        hung = asyncio.create_task(runner.run({"file": str(file)}, client))
        await wait_until(started)
        hung.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hung
        sleeper = int(file.read_text())
        await wait_until(lambda: not psutil.pid_exists(sleeper) or is_zombie(sleeper))
        await runner.stop()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_agent_that_hangs_fails_at_its_deadline(
    agents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(agents), prepend=":")
    file = tmp_path / "pid"
    rollout = {"agent": "my_agents:hangs", "agent_timeout_s": 0.5, "max_new_tokens": 8}
    config = load.from_tree(config_tree() | {"rollout": rollout})
    policy = ScriptedPolicy(tokenizer, [])

    async def run() -> None:
        workflow = AgentWorkflow(config, tmp_path / "log")
        prompt = Prompt("0", np.zeros(1, np.int32), {"file": str(file)})
        with pytest.raises(HookFailed, match=r"did not end within rollout.agent_timeout_s = 0\.5"):
            await workflow.run(prompt, policy, Sampling(8, 1.0, [0]))  # type: ignore[arg-type]
        await workflow.stop()

    asyncio.run(asyncio.wait_for(run(), 60))


async def wait_until(done: Callable[[], bool]) -> None:
    while not done():  # noqa: ASYNC110  a process is watched
        await asyncio.sleep(0.01)


def is_zombie(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_command_gets_the_row_and_its_last_line_is_the_reward(tmp_path: Path) -> None:
    client = ClientSettings("http://x/v1", "sk-1", "http://x", "policy")

    async def run(command: str) -> float | None:
        reward = await CommandRunner(command, tmp_path / "log").run({"answer": "5"}, client)
        await asyncio.sleep(0.05)  # until asyncio has seen the end of the output
        return reward

    shell = """sh -c 'cat > /dev/null; echo "$OPENAI_API_KEY" >&2; echo {\\"reward\\": 0.25}'"""
    assert asyncio.run(run(shell)) == 0.25
    assert (tmp_path / "log").read_text() == "sk-1\n"
    assert asyncio.run(run("sh -c 'cat'")) is None
    in_background = """sh -c 'sleep 30 & echo {\\"reward\\": 0.5}'"""
    assert asyncio.run(asyncio.wait_for(run(in_background), 20)) == 0.5
    with pytest.raises(HookFailed, match="exit code 3"):
        asyncio.run(run("sh -c 'exit 3'"))
    with pytest.raises(HookFailed, match="cannot be started"):
        asyncio.run(run("no-such-program"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = (
    "messages prompt input system tools tool_choice n stop stop_sequences max_tokens stream "
    "logprobs instructions previous_response_id response_format reward role content type text name"
).split()
BODIES = st.dictionaries(
    st.sampled_from(FIELDS),
    JSON_VALUES | st.lists(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES), max_size=3),
    max_size=5,
)
PATHS = ["chat/completions", "completions", "responses", "messages", "reward"]


def test_no_body_is_an_internal_error(tokenizer: Tokenizer) -> None:
    """A fuzz of all paths. Requests that happen to be valid are answered."""

    async def ask(bodies: list[tuple[str, dict[str, Any]]]) -> set[int]:
        statuses = set()
        async with (
            serving(tokenizer, max_requests=10**6) as served,
            aiohttp.ClientSession() as http,
        ):
            headers = {"Authorization": f"Bearer {served.session.key}"}
            for path, body in bodies:
                url = f"{served.endpoint.url}/v1/{path}"
                async with http.post(url, json=body, headers=headers) as reply:
                    assert reply.status < 500, (path, body, await reply.text())
                    statuses.add(reply.status)
                    if reply.status != 200:
                        assert (await reply.json())["error"]["message"]
        return statuses

    @settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(st.lists(st.tuples(st.sampled_from(PATHS), BODIES), min_size=20, max_size=20))
    def fuzz(bodies: list[tuple[str, dict[str, Any]]]) -> None:
        asyncio.run(ask(bodies))

    fuzz()


def test_episode_without_a_request_is_no_sample(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        async with serving(tokenizer) as served:
            with pytest.raises(Exception, match="made no request"):
                served.sample()

    asyncio.run(ask())


def test_sequences_of_a_sample_are_cut_at_its_starts() -> None:
    zeros = np.zeros(7, np.int32)
    sample = Sample(zeros, zeros.astype(np.float32), zeros, "stop", "", starts=[0, 3, 5])
    assert [(s.start, s.stop) for s in sample.sequences()] == [(0, 3), (3, 5), (5, 7)]
