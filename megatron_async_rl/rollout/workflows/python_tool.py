"""The policy may call Python while it answers: its programs run in the sandbox.

A call has the form of the model's chat template (`<tool_call>{"name": "python", "arguments":
{"code": ...}}</tool_call>`, the form of Qwen and Hermes), or is a fenced Python program that ends
the turn. The program's output is given back as a message; its tokens are context and not trained.
The reward function scores the text of the last turn.
"""

from __future__ import annotations

import re

from megatron_async_rl.protocol.types import Prompt, Sample
from megatron_async_rl.rollout import tool_calls
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.python_runner import PythonRunner
from megatron_async_rl.rollout.tool_calls import BadCall, ToolCall
from megatron_async_rl.rollout.workflow import Episode, Policy
from megatron_async_rl.rollout.workflows import options

_OPENING = re.compile(r"```(?:python|py)[ \t]*\n")


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
        self._processes = options.integer("processes", processes, 1)
        self._python: PythonRunner | None = None  # the first sample brings its settings

    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        if self._python is None:
            settings = policy.config.sandbox
            self._python = PythonRunner(settings, self._processes, self._max_output_chars)
        episode = Episode(prompt.ids)
        episode.metrics["tool_calls"] = 0
        for number in range(1, self._max_turns + 1):
            turn = await policy.generate(episode.ids, sampling)
            episode.add_turn(turn)
            text = policy.tokenizer.decode(turn.ids)
            calls = find_calls(text)
            if not calls or turn.stop == "length" or number == self._max_turns:
                break
            messages = [await _answer(call, self._python) for call in calls]
            episode.metrics["tool_calls"] += len(calls)
            context = policy.next_turn(prompt, turn, messages)
            if not episode.has_room(context, policy.config.model.context_tokens):
                return episode.sample("length", text)
            episode.add_context(context)
        return episode.sample(turn.stop, text)


async def _answer(call: ToolCall | BadCall | str, python: PythonRunner) -> dict[str, str]:
    """Returns the message with the output of a call. Raises SandboxError and SandboxLost."""
    match call:
        case str():
            return {"role": "user", "content": f"```output\n{await python.run(call)}\n```"}
        case BadCall():
            output = call.error
        case ToolCall():
            output = await python.answer(call)
    return {"role": "tool", "name": "python", "content": output}


def find_calls(text: str) -> list[ToolCall | BadCall | str]:
    """Returns the calls in a response, in order; without any, the program of a fence at its end."""
    if calls := tool_calls.find(text):
        return [*calls]
    text, closing, after = text.rpartition("```")
    openings = list(_OPENING.finditer(text))
    if not closing or after.strip() or not openings:
        return []
    program = text[openings[-1].end() :]
    return [] if "\n```" in f"\n{program}" else [program]  # another block ends the turn
