"""A reward process joined to a hub that the test holds, and the requests it is sent."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from paths import ROOT

from megatron_async_rl.config import load
from megatron_async_rl.protocol.hub import Hub, Peer
from megatron_async_rl.protocol.messages import (
    Heartbeat,
    Hello,
    ScoreRequest,
    ScoreResult,
    Welcome,
)
from megatron_async_rl.protocol.types import SampleKey

SLOW_ANSWER = r"\boxed{9^{9^{9^{9}}} + 1}"  # would be evaluated for hours


def score_request(response: str, answer: Any = "42", index: int = 0, **row: Any) -> ScoreRequest:
    row = {"id": "row-1", "answer": answer, **row}
    return ScoreRequest(SampleKey(1, 2, 3, index), response, row)


def descendant_pids(pid: int) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # the process has just ended
        parents[int(stat.parent.name)] = int(fields[1])
    found, border = set(), {pid}
    while border:
        border = {child for child, parent in parents.items() if parent in border}
        found |= border
    return found


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.02)


def start_reward_process(run_dir: Path) -> subprocess.Popen[bytes]:
    with (run_dir / "stderr").open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_async_rl.reward", str(run_dir), "reward-0"],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{run_dir}"},
            stderr=stderr,
        )


def with_reward_process(
    tmp_path: Path,
    test: Callable[[Hub, Peer, subprocess.Popen[bytes]], Awaitable[None]],
    sandbox: dict[str, Any] | None = None,
    **reward: Any,
) -> None:
    """Calls `test` with a hub and a reward process that has joined it; kills the process then."""
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
        process = start_reward_process(tmp_path)
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

    asyncio.run(asyncio.wait_for(body(), 120))


async def collect_scores(
    hub: Hub, peer: Peer, messages: list[ScoreRequest]
) -> dict[int, ScoreResult]:
    """Sends the requests and returns their results by sample index."""
    for message in messages:
        await hub.send(peer, message)
    scored: dict[int, ScoreResult] = {}
    while len(scored) < len(messages):
        _, answer = await hub.receive()
        if isinstance(answer, ScoreResult):
            scored[answer.key.index] = answer
        else:
            assert isinstance(answer, Heartbeat)
    return scored
