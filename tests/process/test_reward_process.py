"""The reward process, with a controller written by hand at the other end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from test_reward import HOSTILE, score

from megatron_async_rl.config import load
from megatron_async_rl.protocol.messages import Heartbeat, Hello, Score, Scored, Shutdown, Welcome
from megatron_async_rl.protocol.transport import Hub, Peer


def descendants(pid: int) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone meanwhile
        parents[int(stat.parent.name)] = int(fields[1])
    found, border = set(), {pid}
    while border:
        border = {child for child, parent in parents.items() if parent in border}
        found |= border
    return found


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 5
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.02)


def start_process(run_dir: Path) -> subprocess.Popen[bytes]:
    with (run_dir / "stderr").open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_async_rl.reward", str(run_dir), "reward-0"],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{run_dir}"},
            stderr=stderr,
        )


def with_process(
    tmp_path: Path,
    test: Callable[[Hub, Peer, subprocess.Popen[bytes]], Awaitable[None]],
    sandbox: dict[str, Any] | None = None,
    **reward: Any,
) -> None:
    """The reward process joined to a hub, and gone with all its children at the end."""
    tree = {
        "run": {"dir": str(tmp_path), "steps": 1},
        "model": {"path": "none", "context_tokens": 16},
        "data": {"train": "none"},
        "rollout": {"max_new_tokens": 8},
        "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
        "reward": reward,
        "sandbox": sandbox or {},
    }
    (tmp_path / "config.yaml").write_text(load.dump(load.from_tree(tree)))

    async def body() -> None:
        hub = Hub(tmp_path)
        process = start_process(tmp_path)
        try:
            peer, hello = await hub.receive()
            assert isinstance(hello, Hello)
            assert (hello.role, hello.name, hello.pid) == ("reward", "reward-0", process.pid)
            assert hello.capacity > 0
            await hub.send(peer, Welcome(epoch=1))
            await test(hub, peer, process)
        finally:
            process.kill()
            process.wait()
            hub.close()

    asyncio.run(asyncio.wait_for(body(), 30))


async def scored_by(hub: Hub, peer: Peer, messages: list[Score]) -> dict[int, Scored]:
    for message in messages:
        await hub.send(peer, message)
    scored: dict[int, Scored] = {}
    while len(scored) < len(messages):
        _, answer = await hub.receive()
        if isinstance(answer, Scored):
            scored[answer.index] = answer
        else:
            assert isinstance(answer, Heartbeat)
    return scored


def test_the_process_answers_every_score_and_ends_at_shutdown(tmp_path: Path) -> None:
    async def test(hub: Hub, peer: Peer, process: subprocess.Popen[bytes]) -> None:
        responses = [HOSTILE, r"\boxed{42}", r"\boxed{41}", r"\boxed{42\text{ cm}}", ""]
        scored = await scored_by(
            hub, peer, [score(text, index=n) for n, text in enumerate(responses)]
        )
        assert [scored[n].reward for n in range(5)] == [0.0, 1.0, 0.0, 1.0, 0.0]
        assert [scored[n].error for n in range(5)] == ["timeout", "", "", "", ""]
        left = descendants(process.pid)
        assert left
        await hub.send(peer, Shutdown(reason="done"))
        assert await asyncio.to_thread(process.wait, 10) == 0
        wait_until_gone(left)

    with_process(tmp_path, test, timeout_s=0.5)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_leaves_no_child_behind_when_it_is_killed_in_the_middle(
    tmp_path: Path, signum: signal.Signals
) -> None:
    async def test(hub: Hub, peer: Peer, process: subprocess.Popen[bytes]) -> None:
        await scored_by(hub, peer, [score(r"\boxed{42\text{ cm}}")])
        await hub.send(peer, score(HOSTILE))
        await asyncio.sleep(0.5)
        left = descendants(process.pid)
        assert left
        started = time.monotonic()
        process.send_signal(signum)
        assert await asyncio.to_thread(process.wait, 10) == (
            0 if signum == signal.SIGTERM else -signal.SIGKILL
        )
        assert time.monotonic() - started < 4
        wait_until_gone(left)

    with_process(tmp_path, test, timeout_s=60.0)


def test_the_process_ends_with_the_name_of_a_function_that_cannot_be_loaded(tmp_path: Path) -> None:
    async def test(hub: Hub, peer: Peer, process: subprocess.Popen[bytes]) -> None:
        assert await asyncio.to_thread(process.wait, 15) == 2
        line = "error: reward.function = 'no_such_module:judge' cannot be loaded"
        assert line in (tmp_path / "stderr").read_text()

    with_process(tmp_path, test, function="no_such_module:judge")
