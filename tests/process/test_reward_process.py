"""The reward process, driven by a hub in place of the controller."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from pathlib import Path

import pytest
from reward_process import (
    SLOW_ANSWER,
    collect_scores,
    descendant_pids,
    score_request,
    wait_until_gone,
    with_reward_process,
)

from megatron_async_rl.protocol.hub import Hub, Peer
from megatron_async_rl.protocol.messages import (
    Shutdown,
)


def test_reward_process_answers_every_request_and_ends_at_shutdown(tmp_path: Path) -> None:
    async def test(hub: Hub, peer: Peer, process: subprocess.Popen[bytes]) -> None:
        responses = [SLOW_ANSWER, r"\boxed{42}", r"\boxed{41}", r"\boxed{42\text{ cm}}", ""]
        scored = await collect_scores(
            hub, peer, [score_request(text, index=n) for n, text in enumerate(responses)]
        )
        assert [scored[n].reward for n in range(5)] == [0.0, 1.0, 0.0, 1.0, 0.0]
        assert [scored[n].error for n in range(5)] == ["timeout", "", "", "", ""]
        left = descendant_pids(process.pid)
        assert left
        await hub.send(peer, Shutdown(reason="done"))
        assert await asyncio.to_thread(process.wait, 30) == 0
        wait_until_gone(left)

    with_reward_process(tmp_path, test, timeout_s=3.0)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_killed_reward_process_leaves_no_child(tmp_path: Path, signum: signal.Signals) -> None:
    async def test(hub: Hub, peer: Peer, process: subprocess.Popen[bytes]) -> None:
        await collect_scores(hub, peer, [score_request(r"\boxed{42\text{ cm}}")])
        await hub.send(peer, score_request(SLOW_ANSWER))
        await asyncio.sleep(0.5)
        left = descendant_pids(process.pid)
        assert left
        process.send_signal(signum)
        # less than the deadline of the request
        assert await asyncio.to_thread(process.wait, 30) == (
            0 if signum == signal.SIGTERM else -signal.SIGKILL
        )
        wait_until_gone(left)

    with_reward_process(tmp_path, test, timeout_s=60.0)


def test_reward_process_names_an_unloadable_function(tmp_path: Path) -> None:
    async def test(hub: Hub, peer: Peer, process: subprocess.Popen[bytes]) -> None:
        assert await asyncio.to_thread(process.wait, 60) == 2
        line = "error: reward.function = 'no_such_module:judge' cannot be loaded"
        assert line in (tmp_path / "stderr").read_text()

    with_reward_process(tmp_path, test, function="no_such_module:judge")
