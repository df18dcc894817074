"""Runs the Python programs that the policy writes, in the code sandbox of this host.

Used by the workflow python_tool, and for agents' requests with the tool `python`.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from megatron_async_rl.config.sections import SandboxConfig
from megatron_async_rl.rollout.tool_calls import ToolCall
from megatron_async_rl.sandbox.sandbox import End, Limits, Sandbox

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


class PythonRunner:
    """`processes`: programs that run at once. Longer output than `max_output_chars` is shortened.

    Time and memory of a program: `sandbox.test_timeout_s` and `sandbox.memory_mb`.
    """

    def __init__(
        self, settings: SandboxConfig, processes: int = 4, max_output_chars: int = 2000
    ) -> None:
        self._settings, self._max_output_chars = settings, max_output_chars
        self._executor = ThreadPoolExecutor(processes, "python-runner")
        self._local = threading.local()  # .sandbox: one per thread

    async def answer(self, call: ToolCall) -> str:
        """Returns the output of the program that a call names, or the error in the call.

        Raises SandboxError and SandboxLost.
        """
        if call.name != "python":
            return f"error: there is no tool {call.name!r}, only python"
        code = call.arguments.get("code")
        if not isinstance(code, str):
            return f"error: `code` must be a text, it is a {type(code).__name__}"
        return await self.run(code)

    async def run(self, code: str) -> str:
        """Returns the output of the program. Raises SandboxError and SandboxLost."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run, code)

    def _run(self, code: str) -> str:
        """Runs a program in this thread's sandbox; the kernel ends the sandbox with the thread."""
        settings = self._settings
        if not hasattr(self._local, "sandbox"):
            self._local.sandbox = Sandbox(settings.python, settings.isolation)
        limits = Limits(settings.test_timeout_s, settings.memory_mb << 20)
        result = self._local.sandbox.run(_PROGRAM.format(code=code), b"", limits)
        output = result.output.decode("utf-8", "replace").strip()
        if result.end is not End.OK:
            output = f"{output}\nerror: the program {result.end.value}".lstrip()
        return shortened(output, self._max_output_chars) or "(no output: print the result)"


def shortened(text: str, max_chars: int) -> str:
    """Returns the text, without its middle if it has more than `max_chars` characters."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half} characters left out) ...\n{text[-half:]}"
