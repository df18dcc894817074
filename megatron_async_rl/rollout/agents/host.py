"""`python -m megatron_async_rl.rollout.agents.host MODULE:FUNCTION LOG`: a fork for each episode.

The user's module is imported once; each episode is a fork of this process, so that blocking code, a
crash, a leak or threads hurt that episode alone. One JSON object per line:

    stdin    {"id": 1, "row": {...}, "client": {...}}    run an episode
             {"kill": 1}                                 end it, with all that it has started
    stdout   {"id": 1, "reward": 0.5 or null} or {"id": 1, "error": "..."}

The output of agents goes to LOG. The host ends with its parent, and the agents with the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import os
import selectors
import signal
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_async_rl import hooks, processes
from megatron_async_rl.observability.error_log import user_error
from megatron_async_rl.rollout.agents.client import ClientSettings

MAX_ANSWER = 1 << 20  # bytes: a reward for each of several 10,000 turns


@dataclass
class _Episode:
    id: int
    pid: int
    answer: bytes = b""


class Host:
    def __init__(self, agent: Any, output: int) -> None:
        self._agent, self._output = agent, output
        self._selector = selectors.DefaultSelector()
        self._episodes: dict[int, _Episode] = {}  # by the descriptor of their answer
        self._input = b""

    def serve(self) -> None:
        """Serves until stdin is closed."""
        self._selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fd != 0:
                    self._read_answer(key.fd)
                elif not self._read_requests():
                    for fd in list(self._episodes):
                        self._end(fd)
                    return

    def _read_requests(self) -> bool:
        data = os.read(0, 1 << 16)
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if "kill" in request:
                for fd in [f for f, e in self._episodes.items() if e.id == request["kill"]]:
                    self._end(fd)
            else:
                self._start(request)
        return bool(data)

    def _start(self, request: dict[str, Any]) -> None:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(self._output)
            _run_episode(self._agent, request, theirs)
        os.close(theirs)
        with contextlib.suppress(OSError):  # it may have done so itself, or have ended
            os.setpgid(pid, pid)
        self._episodes[ours] = _Episode(request["id"], pid)
        self._selector.register(ours, selectors.EVENT_READ)

    def _read_answer(self, fd: int) -> None:
        data, episode = os.read(fd, 1 << 16), self._episodes[fd]
        episode.answer += data
        if data and b"\n" not in data and len(episode.answer) <= MAX_ANSWER:
            return
        status = self._end(fd)
        if len(episode.answer) > MAX_ANSWER:
            answer = {"error": f"it returned more than {MAX_ANSWER} bytes, must be rewards alone"}
        elif episode.answer.endswith(b"\n"):
            answer = json.loads(episode.answer)
        else:
            code = os.waitstatus_to_exitcode(status)
            ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            answer = {"error": f"its process ended with {ended}"}
        line = json.dumps({"id": episode.id, **answer}) + "\n"
        os.write(self._output, line.encode())

    def _end(self, fd: int) -> int:
        """Kills the remaining processes of an episode; returns the status of its own process."""
        episode = self._episodes.pop(fd)
        self._selector.unregister(fd)
        os.close(fd)
        done, status = os.waitpid(episode.pid, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(episode.pid, signal.SIGKILL)
        return status if done else os.waitpid(episode.pid, 0)[1]


def _run_episode(agent: Any, request: dict[str, Any], output: int) -> NoReturn:
    """Runs the agent in this fork; its answer is one line."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    processes.die_with_parent()
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    client = ClientSettings(**request["client"])
    os.environ.update(client.environment())
    try:
        returned = agent(request["row"], client)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_result(returned))
        answer = {"reward": returned}
        text = json.dumps(answer)
    except BaseException as e:  # of the agent, such as CancelledError
        text = json.dumps({"error": user_error(e)})
    view = (text + "\n").encode()
    while view:
        view = view[os.write(output, view) :]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


async def _result(awaitable: Any) -> Any:
    return await awaitable


def _load_clients() -> None:
    """Loads the parts of the agent's clients that they would load at their first use.

    Each fork would otherwise do so by itself, which takes more CPU time than a short episode.
    """
    for module, name in (("openai", "OpenAI"), ("anthropic", "Anthropic")):
        if module in sys.modules:
            with contextlib.suppress(Exception):  # of a version that is unlike those we know
                client = getattr(sys.modules[module], name)(api_key="-", base_url="http://-")
                _ = client.chat if name == "OpenAI" else client.messages


def main() -> None:
    output = os.dup(1)  # the user's module may print
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in ("httpx", "httpx2"):  # a line for each request
        logging.getLogger(name).setLevel(logging.WARNING)
    agent = hooks.load("rollout.agent", sys.argv[1])
    _load_clients()
    Host(agent, output).serve()


if __name__ == "__main__":
    processes.main(main)
