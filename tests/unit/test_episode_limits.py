"""Limits of episodes and workers: branches, failures of one completion, memory, descriptors."""

from __future__ import annotations

import asyncio
import os
import resource
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from agent_endpoint import serving
from char_tokenizer import make_chat_folder

from megatron_async_rl.config.config import MAX_SEQUENCES
from megatron_async_rl.config.sections import SandboxConfig
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import HookFailed
from megatron_async_rl.protocol.types import Partial
from megatron_async_rl.rollout import tool_calls
from megatron_async_rl.rollout.agents.apis.request import ChatRequest, RequestError
from megatron_async_rl.rollout.agents.client import ClientSettings
from megatron_async_rl.rollout.agents.runner import CommandRunner, FunctionRunner
from megatron_async_rl.rollout.python_runner import PythonRunner
from megatron_async_rl.rollout.samples.partials import PartialStore


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_chat_folder(tmp_path_factory.mktemp("model")))


def ask(text: str, n: int = 1) -> ChatRequest:
    return ChatRequest(messages=[{"role": "user", "content": text}], n=n)


def test_requests_at_once_start_no_more_branches_than_an_episode_may_have(
    tokenizer: Tokenizer,
) -> None:
    async def run() -> None:
        async with serving(tokenizer) as served:
            session = served.session
            requests = [session.complete(ask(str(n))) for n in range(MAX_SEQUENCES + 6)]
            done = await asyncio.gather(*requests, return_exceptions=True)
            refused = [error for error in done if isinstance(error, RequestError)]
            assert [error.status for error in refused] == [429] * 6
            assert len(served.sample().sequences()) == MAX_SEQUENCES
            [reply] = next(entry for entry in done if isinstance(entry, list))
            follow = [*ask("0").messages, reply.as_message(), {"role": "user", "content": "more"}]
            twice = [session.complete(ChatRequest(messages=follow)) for _ in range(2)]
            done = await asyncio.gather(*twice, return_exceptions=True)
            assert sum(isinstance(error, RequestError) for error in done) == 1
            assert len(served.sample().sequences()) == MAX_SEQUENCES

    asyncio.run(asyncio.wait_for(run(), 60))


def test_refused_request_leaves_none_of_its_completions_in_the_engine(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with serving(tokenizer) as served:
            for number in range(MAX_SEQUENCES - 2):
                await served.session.complete(ask(str(number)))
            served.policy.gate.clear()
            with pytest.raises(RequestError, match="branches already"):
                await served.session.complete(ask("q", n=4))
            await asyncio.sleep(0)
            served.policy.gate.set()
            await asyncio.sleep(0.01)
            assert len(served.session.transcript.turns) == MAX_SEQUENCES - 2

    asyncio.run(asyncio.wait_for(run(), 60))


def test_response_that_continues_keeps_system_messages_of_the_input(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with serving(tokenizer, "a", "b") as served:
            create = served.openai.responses.create
            given: Any = [
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": "x"},
            ]
            first = await create(model="policy", input=given, instructions="once")
            await create(model="policy", input="y", previous_response_id=first.id)
            text = served.session.transcript.turns[-1].text
            assert "be kind" in text and "once" not in text

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("value", [r'"\ud800"', "NaN", "-Infinity"])
def test_text_that_clients_cannot_read_as_json_is_no_tool_call(value: str) -> None:
    text = f'<tool_call>{{"name": "add", "arguments": {{"a": {value}}}}}</tool_call>'
    assert tool_calls.split(text) == (text, [])


def test_partial_samples_of_a_worker_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_async_rl.rollout.samples.partials.MAX_BYTES", 3000)
    store = PartialStore()
    versions, logprobs = np.zeros(10, np.int32), np.zeros(10, np.float32)

    def keep(index: int, num_experts: int) -> None:
        experts = np.ones(num_experts, np.uint8)
        store.keep((1, index), Partial(versions, logprobs, versions, experts))

    for index in (0, 1, 2, 0):  # 0 becomes the newest, and counts once
        keep(index, 800)
    assert [index for index in range(3) if store.longest((1, index), None, 0)] == [0, 1, 2]
    keep(3, 800)
    assert [index for index in range(4) if store.longest((1, index), None, 0)] == [0, 2, 3]
    keep(4, 5000)  # the newest is kept, whatever its size
    assert [index for index in range(5) if store.longest((1, index), None, 0)] == [4]


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Opens so many files that new ones have numbers above 1024, as with many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("needs a hard limit of 2,048 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened: list[int] = []
    try:
        while not opened or opened[-1] < 1100:
            opened.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_programs_run_in_a_worker_with_more_than_a_thousand_connections() -> None:
    runner = PythonRunner(SandboxConfig(), processes=1)
    assert asyncio.run(runner.run("print(6 * 7)")) == "42"


def test_end_of_a_host_fails_only_its_own_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that left the group of its agent may hold the output of the old host open."""
    (tmp_path / "escapes.py").write_text(
        "import os, time\n"
        "def agent(row, client):\n"
        "    if row['escapes'] and not os.fork():\n"
        "        os.setpgid(0, 0)\n"
        "        open(row['escapes'], 'w').write(str(os.getpid()))\n"
        "        time.sleep(60)\n"
        "    open(row['file'], 'w').close()\n"
        "    while not os.path.exists(row['until']):\n"
        "        time.sleep(0.01)\n"
        "    return 1\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    client, files = ClientSettings("u", "k", "a", "m"), [tmp_path / name for name in "abc"]
    until = tmp_path / "until"

    async def started(file: Path) -> None:
        while not file.exists():  # noqa: ASYNC110, ASYNC240  a process is watched
            await asyncio.sleep(0.01)

    async def run() -> None:
        runner = FunctionRunner("escapes:agent", tmp_path / "agents.log")

        def episode(file: Path, escapes: str) -> asyncio.Task[Any]:
            row = {"file": str(file), "until": str(until), "escapes": escapes}
            return asyncio.create_task(runner.run(row, client))

        first = episode(files[0], str(files[2]))
        await started(files[0])
        await started(files[2])
        assert runner._host
        runner._host.kill()
        while runner._host.returncode is None:  # noqa: ASYNC110  a process is watched
            await asyncio.sleep(0.01)
        second = episode(files[1], "")
        await started(files[1])
        os.kill(int(files[2].read_text()), 9)  # now the output of the first host is closed
        with pytest.raises(HookFailed, match="ended with exit code"):
            await first
        until.touch()
        assert await second == 1
        await runner.stop()

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("is_starting", [False, True], ids=["running", "starting"])
def test_cancelled_command_ends_although_a_daemon_holds_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_starting: bool
) -> None:
    monkeypatch.setattr("megatron_async_rl.rollout.agents.runner.KILLED_S", 0.1)
    pid = tmp_path / "pid"
    command = f"sh -c 'setsid sleep 30 & echo $! > {pid}; wait'"

    def has_session() -> bool:
        text = pid.read_text().strip() if pid.exists() else ""
        return bool(text) and os.getsid(int(text)) == int(text)

    async def run() -> None:
        runner = CommandRunner(command, tmp_path / "agents.log")
        client = ClientSettings("u", "k", "a", "m")
        episode = asyncio.create_task(runner.run({}, client))
        for _ in range(2):  # the process runs, asyncio has not connected its pipes
            await asyncio.sleep(0)
        while not has_session():
            if is_starting:
                time.sleep(0.01)  # noqa: ASYNC251
            else:
                await asyncio.sleep(0.01)
        daemon = int(pid.read_text())
        episode.cancel()
        done, _ = await asyncio.wait([episode], timeout=20)
        os.kill(daemon, 9)
        await asyncio.sleep(0.05)  # until the output is closed
        assert done and episode.cancelled()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_break_of_a_long_history_is_found_with_few_renderings(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rendered = []
    render = Tokenizer.render_chat
    monkeypatch.setattr(
        Tokenizer, "render_chat", lambda *given: rendered.append(1) or render(*given)
    )

    async def run() -> None:
        async with serving(tokenizer) as served:
            roles = ["user", "assistant"] * 60
            messages: list[Any] = [{"role": r, "content": str(n)} for n, r in enumerate(roles)]
            await served.session.complete(ChatRequest(messages=messages))
            messages[77] = {"role": "assistant", "content": "other"}
            await served.session.complete(ChatRequest(messages=messages))

    asyncio.run(asyncio.wait_for(run(), 60))
    assert "message 77 (assistant) does not continue" in caplog.text
    assert len(rendered) < 12


def test_long_output_of_a_command_is_not_kept(tmp_path: Path) -> None:
    """It writes before it reads its row, which is larger than a pipe."""
    script = r"""head -c 20000000 /dev/zero; cat | wc -c >&2; echo; echo {\"reward\": 0.5}"""
    log = tmp_path / "agents.log"

    async def run() -> Any:
        runner = CommandRunner(f"sh -c '{script}'", log)
        return await runner.run({"x": "y" * 500_000}, ClientSettings("u", "k", "a", "m"))

    tracemalloc.start()
    try:
        assert asyncio.run(asyncio.wait_for(run(), 60)) == 0.5
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert int(log.read_text()) == 500_009


def test_zero_tokens_are_refused_under_both_names(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with serving(tokenizer) as served:
            for name in ("max_tokens", "max_completion_tokens", "n"):
                with pytest.raises(openai.BadRequestError):
                    await served.chat([{"role": "user", "content": "a"}], **{name: 0})

    asyncio.run(asyncio.wait_for(run(), 60))
