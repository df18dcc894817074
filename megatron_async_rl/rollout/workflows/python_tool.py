"""The policy may call Python while it answers: its programs run in the sandbox.

A call is written as the model's chat template says (`<tool_call>{"name": "python", "arguments":
{"code": ...}}</tool_call>`, the form of Qwen and Hermes), or is a fenced Python program that ends
the turn. The program's output is given back as a message; its tokens are context and not trained.
The reward function scores the text of the last turn.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_async_rl.config.sections import SandboxConfig
from megatron_async_rl.protocol.types import Prompt, Sample
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.workflow import Episode, Policy
from megatron_async_rl.rollout.workflows import options
from megatron_async_rl.sandbox.sandbox import End, Limits, Sandbox, SandboxSettings

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_FENCE = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```\s*\Z", re.DOTALL)
# Runs a program so that its errors and its stderr are part of the output.
_PROGRAM = """\
import sys, traceback
sys.stderr = sys.stdout
try:
    exec(compile({code!r}, "program.py", "exec"), {{"__name__": "__main__"}})
except SystemExit:
    pass
except BaseException as e:
    traceback.print_exception(type(e), e, e.__traceback__.tb_next)
"""


class PythonTool:
    """Up to `max_turns` turns; a call in the last one is not run.

    `max_output_chars`: longer output is shortened in the middle. `processes`: programs that run at
    once on this rollout worker's host. Time and memory of a program: `sandbox.test_timeout_s` and
    `sandbox.memory_mb`.
    """

    def __init__(
        self, max_turns: int = 4, max_output_chars: int = 2000, processes: int = 4
    ) -> None:
        self._max_turns = options.integer("max_turns", max_turns, 1)
        self._max_output_chars = options.integer("max_output_chars", max_output_chars, 100)
        threads = options.integer("processes", processes, 1)
        self._executor = ThreadPoolExecutor(threads, "python-tool")
        self._local = threading.local()  # .sandbox: one per thread

    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        episode = Episode(prompt.ids)
        episode.metrics["tool_calls"] = 0
        for number in range(1, self._max_turns + 1):
            turn = await policy.generate(episode.ids, sampling)
            episode.add_turn(turn)
            text = policy.tokenizer.decode(turn.ids)
            calls = find_calls(text)
            if not calls or turn.stop == "length" or number == self._max_turns:
                break
            messages = [await self._answer(call, policy.config.sandbox) for call in calls]
            episode.metrics["tool_calls"] += len(calls)
            context = policy.next_turn(prompt, turn, messages)
            if not episode.has_room(context, policy.config.model.context_tokens):
                return episode.sample("length", text)
            episode.add_context(context)
        return episode.sample(turn.stop, text)

    async def _answer(self, call: Call, settings: SandboxConfig) -> dict[str, str]:
        """Returns the message with the output of a call. Raises SandboxError and SandboxLost."""
        output = call.error
        if not output:
            loop = asyncio.get_running_loop()
            output = await loop.run_in_executor(self._executor, self._execute, call.code, settings)
        if call.is_fenced:
            return {"role": "user", "content": f"```output\n{output}\n```"}
        return {"role": "tool", "name": "python", "content": output}

    def _execute(self, code: str, settings: SandboxConfig) -> str:
        """Runs a program in this thread's sandbox; the kernel ends the sandbox with the thread."""
        if not hasattr(self._local, "sandbox"):
            self._local.sandbox = Sandbox(SandboxSettings(settings.python, settings.isolation))
        limits = Limits(settings.test_timeout_s, settings.memory_mb << 20)
        result = self._local.sandbox.run(_PROGRAM.format(code=code), b"", limits)
        output = result.output.decode("utf-8", "replace").strip()
        if result.end is not End.OK:
            output = f"{output}\nerror: the program {result.end.value}".lstrip()
        return shortened(output, self._max_output_chars) or "(no output: print the result)"


@dataclass(frozen=True)
class Call:
    """A program to run, or the error in a call that names none."""

    code: str
    error: str = ""
    is_fenced: bool = False


def find_calls(text: str) -> list[Call]:
    """Returns the calls in a response, in order; a fence counts if there are no others."""
    if calls := _CALL.findall(text):
        return [_parse(call) for call in calls]
    fence = _FENCE.search(text)
    return [Call(fence[1], is_fenced=True)] if fence else []


def _parse(text: str) -> Call:
    try:
        call: Any = json.loads(text, strict=False)  # newlines in a text need no escape
        name, arguments = call["name"], call["arguments"]
        code = (json.loads(arguments) if isinstance(arguments, str) else arguments)["code"]
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        form = '{"name": "python", "arguments": {"code": "..."}}'
        return Call("", f"error: a call is JSON of the form {form} ({type(e).__name__}: {e})")
    if name != "python":
        return Call("", f"error: there is no tool {name!r}, only python")
    if not isinstance(code, str):
        return Call("", f"error: `code` must be a text, it is a {type(code).__name__}")
    return Call(code)


def shortened(text: str, max_chars: int) -> str:
    """Returns the text, without its middle if it has more than `max_chars` characters."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half} characters left out) ...\n{text[-half:]}"
