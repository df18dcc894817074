"""The reward worker: broken functions give no reward, hostile answers end at the deadline."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from paths import python_environment
from reward_process import SLOW_ANSWER, score_request

from megatron_async_rl.config.sections import RewardConfig, SandboxConfig
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.protocol.types import SampleKey
from megatron_async_rl.reward.worker import RewardWorker


def with_worker(test: Callable[[RewardWorker], Awaitable[None]], **settings: Any) -> None:
    async def body() -> None:
        worker = RewardWorker(RewardConfig(**settings), SandboxConfig())
        try:
            await worker.start()
            await test(worker)
        finally:
            worker.stop()

    asyncio.run(asyncio.wait_for(body(), 120))


def test_plain_number_is_scored_without_a_child() -> None:
    async def test(worker: RewardWorker) -> None:
        right = worker.score_inline(score_request(r"\boxed{42}", index=5))
        wrong = worker.score_inline(score_request(r"\boxed{41}"))
        broken = worker.score_inline(score_request(r"\boxed{41}", answer=None))
        assert right is not None and wrong is not None and broken is not None
        assert right.key == SampleKey(1, 2, 3, 5)
        assert (right.reward, right.error) == (1.0, "")
        assert (wrong.reward, wrong.error) == (0.0, "")
        assert broken.reward is None
        assert "row-1" in broken.error and "answer" in broken.error
        assert worker.score_inline(score_request(SLOW_ANSWER)) is None
        assert worker.num_pools == 0

    with_worker(test)


def test_hostile_answers_end_at_the_deadline_and_others_are_scored() -> None:
    async def test(worker: RewardWorker) -> None:
        await worker.score(score_request(r"\boxed{42\text{ cm}}"))  # starts the children
        messages = [score_request(SLOW_ANSWER), score_request(SLOW_ANSWER)]
        messages += [
            score_request(rf"\boxed{{{40 + n}\text{{ cm}}}}", "42", index=n) for n in range(5)
        ]
        first, second, *others = await asyncio.gather(*map(worker.score, messages))
        for scored in (first, second):  # either would be evaluated for hours
            assert (scored.reward, scored.error) == (0.0, "timeout")
            assert scored.seconds >= 3
        assert [scored.reward for scored in others] == [0.0, 0.0, 1.0, 0.0, 0.0]
        assert [scored.error for scored in others] == [""] * 5
        assert worker.num_pools == 1

    with_worker(test, timeout_s=3.0)


def test_clock_jump_is_an_infrastructure_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process pool measures by the wall clock, which jumps by an hour during a scoring."""
    now, ahead_s = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + ahead_s[0])

    async def test(worker: RewardWorker) -> None:
        await worker.score(score_request(r"\boxed{\sqrt{4}}", "2"))  # starts the child
        scoring = asyncio.create_task(worker.score(score_request(SLOW_ANSWER, "7")))
        while not scoring.done():  # the first jump may come before it has begun
            await asyncio.wait([scoring], timeout=1)
            ahead_s[0] += 3600.0
        scored = await scoring
        assert scored.reward is None and "this host's clock was changed" in scored.error

    with_worker(test, timeout_s=100.0)


CUSTOM = """
import asyncio, os, sys, time
from pathlib import Path

import numpy as np

loaded = os.getpid()

class Unpicklable(Exception):
    def __init__(self, a, b): super().__init__("two arguments")

def judge(prompt, response, row):
    assert loaded == os.getpid(), "loaded in another process"
    match response:
        case "raise": raise Unpicklable(1, 2)
        case "exit": sys.exit(0)
        case "die": os._exit(1)
        case "vanish": os._exit(0)
        case "hang": time.sleep(1000)
        case "nan": return float("nan")
        case "infinite": return float("inf")
        case "text": return "1.0"
        case "none": return None
        case "true": return True
        case "list": return ["1.0"]
        case "empty": return []
        case "nan in list": return [1.0, float("nan")]
        case "metrics": return 0.75, {"format": True, "lines": 3, "bad": float("nan"), 5: "x"}
        case "three": return 1.0, {}, 2
        case "no dict": return 1.0, [2.0]
    return 0.5 if (prompt, row["answer"]) == ("2+2=", "4") else 0.25

loop = set()

async def asked(prompt, response, row):
    await asyncio.sleep(0)
    loop.add(asyncio.get_running_loop())
    return np.bool_(len(loop) == 1), {"length": np.array(len(response))}

def each_turn(prompt, response, row, turns):
    rewards = [float(len(turn)) for turn in turns]
    return (rewards, {"turns": len(turns)}) if turns[0] else rewards

number = 3
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A user's reward function, importable by the children."""
    (tmp_path / "our_rewards.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    yield "our_rewards:judge"


def test_broken_reward_function_is_an_infrastructure_error(custom: str) -> None:
    async def test(worker: RewardWorker) -> None:
        good = score_request("fine", "4", prompt="2+2=")
        assert worker.score_inline(good) is None
        assert (await worker.score(good)).reward == 0.5
        for response, error in {
            "raise": "Unpicklable: two arguments",
            "exit": "SystemExit: 0",
            "nan": "returned nan",
            "infinite": "returned inf",
            "text": "returned a str",
            "none": "returned a NoneType",
            "list": "returned a list",
            "empty": "returned an empty list",
            "nan in list": "returned nan",
            "three": "returned a tuple",
            "no dict": "returned a list",
            "die": "died",
            "vanish": "not scored within 2 s",  # pebble reads exit code 0 as done
            "hang": "not scored within 2 s",
        }.items():
            scored = await worker.score(score_request(response))
            assert scored.reward is None, response
            assert error in scored.error
        assert (await worker.score(score_request("true"))).reward == 1.0
        assert (await worker.score(good)).reward == 0.5

    with_worker(test, function=custom, timeout_s=2.0)


def test_async_reward_function_keeps_its_event_loop(custom: str) -> None:
    async def test(worker: RewardWorker) -> None:
        for response in ("a", "bcd"):
            scored = await worker.score(score_request(response))
            assert (scored.reward, scored.metrics) == (1.0, {"length": len(response)})

    with_worker(test, function="our_rewards:asked")


def test_reward_function_scores_each_turn(custom: str) -> None:
    async def test(worker: RewardWorker) -> None:
        request = score_request("one\n\n\n\nthree")
        scored = await worker.score(msgspec.structs.replace(request, text_ends=[3, 5, 12]))
        assert (scored.reward, scored.turn_rewards) == (8.0, [3.0, 0.0, 5.0])
        assert scored.metrics == {"turns": 3.0}
        scored = await worker.score(score_request(""))
        assert (scored.reward, scored.turn_rewards, scored.metrics) == (0.0, [0.0], {})

    with_worker(test, function="our_rewards:each_turn")


def test_metrics_of_a_reward_function_are_returned(
    custom: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(worker: RewardWorker) -> None:
        for _ in range(3):
            scored = await worker.score(score_request("metrics"))
            assert (scored.reward, scored.metrics) == (0.75, {"format": 1.0, "lines": 3.0})
        assert (await worker.score(score_request("fine"))).metrics == {}

    with_worker(test, function=custom)
    assert caplog.text.count("metric 'bad' = nan is left out") == 1


def test_child_killed_while_idle_is_replaced(custom: str) -> None:
    async def test(worker: RewardWorker) -> None:
        for _ in range(2):
            for pid in child_pids(worker):
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.5)
            scored = await worker.score(score_request("fine"))
            assert (scored.reward, scored.error) == (0.25, "")

    with_worker(test, function=custom)


def child_pids(worker: RewardWorker) -> list[int]:
    assert worker._pool is not None
    return list(worker._pool._pool_manager.worker_manager.workers)


LOST_SOCKET = """
import asyncio, os, shutil, tempfile
import psutil
from reward_process import score_request
from megatron_async_rl.config.sections import RewardConfig, SandboxConfig
from megatron_async_rl.errors import Error
from megatron_async_rl.reward.worker import RewardWorker

async def test():
    worker = RewardWorker(RewardConfig(function="loop_reward:constant"), SandboxConfig())
    await worker.start()
    print((await worker.score(score_request("1"))).reward)
    for name in os.listdir(tempfile.gettempdir()):
        shutil.rmtree(os.path.join(tempfile.gettempdir(), name))
    psutil.Process().children(recursive=True)[-1].kill()  # a scoring process
    results = []
    try:
        for _ in range(3):
            results.append((await worker.score(score_request("1"))).reward)
    except Error as e:
        print(results, e.problem)
    worker.stop()

if __name__ == "__main__":
    asyncio.run(test())
"""


def test_worker_whose_fork_server_was_cleaned_away_ends_to_be_restarted(tmp_path: Path) -> None:
    """Its scoring processes could not be replaced: every group would be dropped."""
    program, temporary = tmp_path / "program.py", tmp_path / "t"
    program.write_text(LOST_SOCKET)
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, str(program)],
        env=python_environment(TMPDIR=str(temporary)),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    first, second = done.stdout.splitlines()
    assert first == "1.0", done.stderr
    assert second.startswith("[None] no scoring process can be started: [Errno 2]"), done.stderr


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("our_rewards:absent", "has no attribute 'absent'"),
        ("our_rewards:number", "it is a int, not a function"),
        ("no_such_module:judge", "No module named 'no_such_module'"),
        ("maths", "neither a known name nor package.module:name"),
        ("our_rewards:judge:", "neither a known name nor package.module:name"),
        ("our_broken:judge", "ZeroDivisionError"),
        ("our_deadly:judge", "died"),
    ],
)
def test_unloadable_reward_function_is_refused_at_startup(
    custom: str, tmp_path: Path, function: str, words: str
) -> None:
    (tmp_path / "our_broken.py").write_text("1 / 0")
    (tmp_path / "our_deadly.py").write_text("import os; os._exit(1)")

    async def test(worker: RewardWorker) -> None:
        pytest.fail("started")

    with pytest.raises(ConfigError, match=words) as refused:
        with_worker(test, function=function)
    assert f"reward.function = {function!r}" in str(refused.value)
