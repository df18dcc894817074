"""The python_tool workflow with real programs in the sandbox."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from chat_model import END, START, Script, make_chat_tokenizer

from megatron_async_rl.config.sections import SandboxConfig
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.rollout.python_runner import PythonRunner
from megatron_async_rl.rollout.workflows.python_tool import PythonTool

SETTINGS = {"data.chat_template": True, "rollout.workflow": "python_tool"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_chat_tokenizer(tmp_path_factory.mktemp("model") / "chat")


def call(code: str) -> str:
    arguments = {"name": "python", "arguments": {"code": code}}
    return f"<tool_call>\n{json.dumps(arguments)}\n</tool_call>"


def output(code: str, **settings: float) -> str:
    runner = PythonRunner(SandboxConfig(**settings), processes=1, max_output_chars=200)  # type: ignore[arg-type]
    return asyncio.run(runner.run(code))


def test_outputs_of_calls_are_the_context_of_the_next_turn(tokenizer: Tokenizer) -> None:
    first = f"let me see\n{call('print(6*7)')}\n{call('print(1/0)')}{END}"
    fence = f"again\n```python\nprint('e' * 3)\n```{END}"
    script = Script(tokenizer, [first, fence, f"\\boxed{{42}}{END}"], {}, SETTINGS)
    sample = script.run(PythonTool(), "6*7?", max_new_tokens=400)
    parts = [tokenizer.decode_all(sample.ids[a:b].tolist()) for a, b in sample.turns()]
    assert parts == [first, fence, f"\\boxed{{42}}{END}"]
    assert (sample.text, sample.stop) == ("\\boxed{42}", "stop")
    assert sample.metrics == {"tool_calls": 3}
    text = tokenizer.decode_all(sample.ids.tolist())
    assert f"{END}\n{START}user\n<tool_response>\n42\n</tool_response>{END}" in text
    assert "ZeroDivisionError: division by zero\n</tool_response>" in text
    assert f"{START}user\n```output\n" in text
    for ids in script.inputs:
        assert sample.ids[: len(ids)].tolist() == ids


def test_call_in_the_last_turn_is_not_run(tokenizer: Tokenizer) -> None:
    script = Script(tokenizer, [call("print(1)") + END] * 2, {}, SETTINGS)
    sample = script.run(PythonTool(max_turns=2), "?")
    assert len(sample.turns()) == 2 and sample.text == call("print(1)")


def test_program_is_limited_and_confined(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("key")
    assert output("while True: pass", test_timeout_s=0.5).endswith("took too long")
    assert "MemoryError" in output("x = 'a' * (1 << 40)")
    assert "Permission denied" in output(f"print(open({str(secret)!r}).read())")
    assert "PermissionError" in output("import socket; socket.socket()")
    assert "characters left out" in output("print('x' * 5000)")
    assert output("import sys; print('bad', file=sys.stderr); sys.exit(3)") == "bad"
    assert output("x = 1") == "(no output: print the result)"
    assert "SyntaxError" in output("print(")
    assert output("print('\\'\"\"\"', '{}')") == '\'""" {}'


def test_event_loop_goes_on_while_programs_run() -> None:
    python = PythonRunner(SandboxConfig(test_timeout_s=60.0), processes=2)
    slow = "import time\ntime.sleep(1)\nprint(1)"

    async def run() -> tuple[list[str], int]:
        await asyncio.gather(*(python.run("print(0)") for _ in range(2)))
        calls = [asyncio.create_task(python.run(slow)) for _ in range(2)]
        turns = 0
        while not any(task.done() for task in calls):
            await asyncio.sleep(0.005)
            turns += 1
        return [await task for task in calls], turns

    outputs, turns = asyncio.run(run())
    assert outputs == ["1", "1"] and turns >= 5  # a loop that waits for a program makes one
