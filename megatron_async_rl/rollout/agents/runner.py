"""Runs the agent of one episode in a process of its own: a Python function or a command.

Both return the reward that the agent gave, or None, and raise HookFailed if it failed. Cancelling
`run` ends the agent and all that it has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from megatron_async_rl import processes
from megatron_async_rl.errors import HookFailed
from megatron_async_rl.rollout.agents.client import ClientSettings
from megatron_async_rl.rollout.agents.transcript import Returned, checked_rewards

LINE_LIMIT = 4 << 20  # bytes of an answer, more than host.MAX_ANSWER
KILLED_S = 1.0  # in which a killed process ends
POLL_S = 0.2  # until it is seen that a process has ended
OUTPUT_LIMIT = 1 << 20  # last bytes of a command's output that are kept

_Waiting = dict[int, asyncio.Future[dict[str, Any]]]  # by the number of the episode


class FunctionRunner:
    """Runs rollout.agent in forks of one host process (host.py), which is started when needed."""

    def __init__(self, agent: str, log: Path) -> None:
        self._agent, self._log = agent, log
        self._host: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: _Waiting = {}  # for answers of this host
        self._starting = asyncio.Lock()
        self._next_id = 0

    async def run(self, row: dict[str, Any], client: ClientSettings) -> Returned:
        host, waiting = await self._started()
        self._next_id += 1
        number, answered = self._next_id, asyncio.get_running_loop().create_future()
        waiting[number] = answered
        try:
            await self._send(host, {"id": number, "row": row, "client": dataclasses.asdict(client)})
            answer = await answered
        except BaseException:
            with contextlib.suppress(OSError):
                await self._send(host, {"kill": number})
            raise
        finally:
            del waiting[number]
        if "error" in answer:
            raise HookFailed(f"rollout.agent = {self._agent} failed; correct it: {answer['error']}")
        return checked_rewards(answer["reward"], f"rollout.agent = {self._agent} returned")

    async def stop(self) -> None:
        if self._host and self._host.returncode is None:
            self._host.kill()
            await _wait_killed(self._host)

    async def _started(self) -> tuple[asyncio.subprocess.Process, _Waiting]:
        async with self._starting:
            if self._host is None or self._host.returncode is not None:
                command = ["-m", "megatron_async_rl.rollout.agents.host", self._agent]
                self._host = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *command,
                    str(self._log),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=LINE_LIMIT,
                )
                self._waiting = {}
                self._reader = asyncio.create_task(self._read(self._host, self._waiting))
            return self._host, self._waiting

    async def _send(self, host: asyncio.subprocess.Process, request: dict[str, Any]) -> None:
        assert host.stdin
        host.stdin.write(json.dumps(request).encode() + b"\n")
        await host.stdin.drain()

    async def _read(self, host: asyncio.subprocess.Process, waiting: _Waiting) -> None:
        assert host.stdout
        while line := await _output_of(host, host.stdout.readline):
            answer = json.loads(line)
            future = waiting.get(answer.pop("id"))
            if future and not future.done():
                future.set_result(answer)
        await _wait_killed(host)
        code = host.returncode
        text = processes.error_text(self._log) if code == processes.EXIT_ERROR else None
        error = text or f"the process that runs agents ended with exit code {code}; see {self._log}"
        for future in waiting.values():
            if not future.done():
                future.set_result({"error": error})


class CommandRunner:
    """Runs rollout.agent_command: the row as JSON on stdin, the clients' variables in its
    environment.

    The reward is that of the last line of its output, if this is JSON: {"reward": number}.
    """

    def __init__(self, command: str, log: Path) -> None:
        self._command, self._log = command, log

    async def run(self, row: dict[str, Any], client: ClientSettings) -> Returned:
        name = f"rollout.agent_command = {self._command!r}"
        with self._log.open("ab") as log:
            starting = asyncio.create_task(
                asyncio.create_subprocess_exec(
                    *shlex.split(self._command),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env={**os.environ, **client.environment()},
                    preexec_fn=_in_new_group,
                )
            )
            try:
                process = await asyncio.shield(starting)
            except OSError as e:
                raise HookFailed(
                    f"{name} cannot be started: {e}", "set rollout.agent_command to a program"
                ) from None
            except asyncio.CancelledError:
                # asyncio would kill the process alone, and wait for what it has started
                with contextlib.suppress(OSError):
                    await _kill_group(await starting)
                raise
        try:
            sending = asyncio.create_task(_send_row(process, row))
            try:
                output = await _last_output(process)
            finally:
                sending.cancel()
        finally:
            await _kill_group(process)
        if process.returncode:
            raise HookFailed(f"{name} ended with exit code {process.returncode}; see {self._log}")
        lines = output.decode(errors="replace").strip().splitlines()
        try:
            answer = json.loads(lines[-1]) if lines else None
        except ValueError:
            return None
        reward = answer.get("reward") if isinstance(answer, dict) else None
        return checked_rewards(reward, f"{name} wrote")

    async def stop(self) -> None:
        pass


async def _send_row(process: asyncio.subprocess.Process, row: dict[str, Any]) -> None:
    assert process.stdin
    with contextlib.suppress(ConnectionError):  # it need not read the row
        process.stdin.write(json.dumps(row).encode())
        await process.stdin.drain()
    process.stdin.close()


async def _last_output(process: asyncio.subprocess.Process) -> bytes:
    """Waits until the process has ended; returns the last OUTPUT_LIMIT bytes of its output."""
    assert process.stdout
    output, read = b"", partial(process.stdout.read, 1 << 16)
    while chunk := await _output_of(process, read):
        output = (output + chunk)[-OUTPUT_LIMIT:]
    if process.returncode is None:
        await process.wait()
    return output


async def _output_of(
    process: asyncio.subprocess.Process, read: Callable[[], Coroutine[Any, Any, bytes]]
) -> bytes:
    """Returns the output of `read`; empty once the process has ended and all output is read.

    A process that it started may hold the output open for longer.
    """
    reading = asyncio.create_task(read())
    try:
        while process.returncode is None and not reading.done():
            await asyncio.wait([reading], timeout=POLL_S)
        done, _ = await asyncio.wait([reading], timeout=POLL_S)  # its output before its end
        return reading.result() if done else b""
    finally:
        reading.cancel()


async def _kill_group(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await _wait_killed(process)


async def _wait_killed(process: asyncio.subprocess.Process) -> None:
    """Waits until a killed process has ended and its output is closed.

    A process that it started, and that has left its group, may hold the output open for longer.
    """
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), KILLED_S)


def _in_new_group() -> None:
    os.setpgid(0, 0)
    processes.die_with_parent()
