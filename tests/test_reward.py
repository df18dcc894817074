"""A reward of 1 comes from a real comparison; a broken judge gives none; a hostile answer costs its deadline."""

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

import pytest

from megatron_async_rl import config
from megatron_async_rl.config import RewardConfig, SandboxConfig
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.messages import Heartbeat, Hello, Score, Scored, Shutdown, Welcome
from megatron_async_rl.reward import math_answer
from megatron_async_rl.reward.worker import RewardWorker
from megatron_async_rl.transport import Hub, Peer

HOSTILE = r"\boxed{9^{9^{9^{9}}}}"
ROOT = Path(__file__).parents[1]


def reward(response: str, answer: Any) -> float:
    return math_answer.math("", response, {"id": "row-1", "answer": answer})


# ---- the built-in reward: which answer counts


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{42}", "42"),
        (r"\boxed{42}", 42),
        (r"First \boxed{41}, no: \boxed{42}", "42"),
        (r"\boxed{42} is what I found in 3 steps.", "42"),
        (r"\boxed{\boxed{42}}", "42"),
        (r"\boxed{42} and \boxed{7", "42"),  # cut off within a second box
        (r"\boxed {42}", "42"),
        ("so 6 * 7 = 42", "42"),
        ("some work\n#### 42", "42"),
        ("some work\n#### 42\n", "6 * 7 = 42\n#### 42"),
        (r"\boxed{42}", r"the sum is $\boxed{42}$."),
        (r"\boxed{-7}", "-7"),
        ("it is -7.", "-7"),
        ("it is \u22127.", "-7"),
        ("10 - 3 = 7", "7"),
        ("10-3=7", "7"),
        (r"\boxed{85.0}", "85"),
        (r"\boxed{85}", 85.0),
        (r"\boxed{1e2}", r"1e2"),
        ("$1,234,567.50", "1234567.5"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{1\,234}", "1234"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{18.}", "18"),
        (r"\boxed{007}", "7"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{\dfrac{2}{4}}", r"\frac{1}{2}"),
        (r"\boxed{-\frac{1}{2}}", "-1/2"),
        ("it is 1/2.", "0.5"),
        (r"so it is \frac{1}{2}", "1/2"),
        (r"\boxed{\text{Evelyn}}", "Evelyn"),
        (r"\boxed{ yes }", r"\text{Yes}"),
    ],
)
def test_a_right_answer_is_seen_at_once(response: str, answer: Any) -> None:
    gold, answered = math_answer.read(response, {"answer": answer})
    assert math_answer.compare_plain(gold, answered) is True


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "42"),
        ("I do not know.", "42"),
        (r"\boxed{}", "42"),
        (r"\boxed{ }", "42"),
        (r"\boxed{42} no, \boxed{41}", "42"),
        (r"\boxed{41} although 42", "42"),
        (r"\boxed{42 or \boxed{41}}", "42"),
        (r"\boxed{42", "421"),
        ("#### 42 or rather 41", "42"),
        ("42, no: 41", "42"),
        (r"\boxed{7}", "-7"),
        (r"\boxed{-7}", "7"),
        (r"\boxed{85.5}", "85"),
        (r"\boxed{100000001}", "100000000"),
        (r"\boxed{2}", r"\frac{1}{2}"),
        (r"the answer is \frac{1}{2}", "2"),
        (r"\boxed{1/3}", "0.25"),
        (r"\boxed{net}", "ten"),
        (r"\boxed{no}", r"\text{no one}"),
    ],
)
def test_a_wrong_answer_is_seen_at_once(response: str, answer: Any) -> None:
    gold, answered = math_answer.read(response, {"answer": answer})
    assert math_answer.compare_plain(gold, answered) is False


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{11\text{ cm}}", "11"),
        (r"\boxed{42 apples}", "42"),
        (r"\boxed{9}", "9 apples"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        (r"\boxed{\{3,2,1\}}", r"\{1,2,3\}"),
        (r"\boxed{12\%}", "0.12"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{0.333333333}", "1/3"),
    ],
)
def test_an_answer_in_other_words_is_right(response: str, answer: str) -> None:
    assert reward(response, answer) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{41, 42}", "42"),
        (r"\boxed{42 \text{ or } 41}", "42"),
        (r"\boxed{\{41, 42\}}", "42"),
        (r"\boxed{42 \ne 41}", "42"),
        (r"\boxed{42 = 41}", "42"),
        (r"\boxed{40, 41, 42, 43}", "42"),
        (r"\boxed{$41$ and $42$}", "42"),
        (r"\boxed{0.3333}", "1/3"),
        (r"\boxed{x}", "42"),
        (r"\boxed{\frac{0}{0}}", "42"),
        (r"\boxed{\infty}", "42"),
        (r"\boxed{" + "(" * 50 + "42}", "421"),
        (r"\boxed{(5,\infty)}", "(5,6)"),
    ],
)
def test_several_guesses_at_once_are_wrong(response: str, answer: str) -> None:
    assert reward(response, answer) == 0.0


@pytest.mark.parametrize(
    "row", [{}, {"answer": None}, {"answer": ""}, {"answer": " $ "}, {"answer": ["4"]}, {"answer": True}]
)
def test_a_row_without_answer_is_an_error_that_names_it(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"row 'row-1' .*`answer`"):
        math_answer.math("", r"\boxed{42}", {"id": "row-1", **row})


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 200_000,
        r"\boxed" + " " * 1_000_000,
        "{" * 500_000 + "}" * 500_000,
        "1,234," * 200_000,
        "9" * 1_000_000,
        "1/" * 500_000,
        r"\frac{1}" + " " * 1_000_000,
        r"\frac{" * 100_000,
        r"\boxed{" + r"\text{" * 10_000 + "}" * 10_001,
        r"\boxed{" + "a b " * 15_000 + "}",
    ],
    ids=range(10),
)
def test_no_text_holds_up_the_part_that_runs_without_deadline(text: str) -> None:
    started = time.perf_counter()
    for gold in ("42", r"\text{a b}"):
        math_answer.compare_plain(*math_answer.read(text, {"answer": gold}))
    assert time.perf_counter() - started < 1.0


def test_the_end_of_a_long_response_is_what_counts() -> None:
    assert reward(r"\boxed{41}" + "so " * 100_000 + r"\boxed{42}", "42") == 1.0


# ---- the worker: deadlines, crashes, broken functions


def score(response: str, answer: Any = "42", index: int = 0, **row: Any) -> Score:
    return Score(
        epoch=1, group_id=2, attempt=3, index=index, response=response, row={"id": "row-1", "answer": answer, **row}
    )


def with_worker(test: Callable[[RewardWorker], Awaitable[None]], **settings: Any) -> None:
    async def body() -> None:
        worker = RewardWorker(RewardConfig(**settings), SandboxConfig())
        try:
            await worker.start()
            await test(worker)
        finally:
            worker.stop()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_plain_verdict_needs_no_child() -> None:
    async def test(worker: RewardWorker) -> None:
        right = worker.score_at_once(score(r"\boxed{42}", index=5))
        wrong = worker.score_at_once(score(r"\boxed{41}"))
        broken = worker.score_at_once(score(r"\boxed{41}", answer=None))
        assert right is not None and wrong is not None and broken is not None
        assert (right.epoch, right.group_id, right.attempt, right.index) == (1, 2, 3, 5)
        assert (right.reward, right.error) == (1.0, "")
        assert (wrong.reward, wrong.error) == (0.0, "")
        assert broken.reward is None
        assert "row-1" in broken.error and "answer" in broken.error
        assert worker.score_at_once(score(r"\boxed{42\text{ cm}}")) is None
        assert worker.num_pools == 0

    with_worker(test)


def test_hostile_answers_end_at_the_deadline_and_the_others_are_judged_right() -> None:
    async def test(worker: RewardWorker) -> None:
        await worker.score(score(r"\boxed{42\text{ cm}}"))  # the children are up
        messages = [score(HOSTILE), score(HOSTILE)]
        messages += [score(rf"\boxed{{{40 + n}\text{{ cm}}}}", "42", index=n) for n in range(5)]
        started = time.perf_counter()
        first, second, *others = await asyncio.gather(*map(worker.score, messages))
        assert time.perf_counter() - started < 8
        for scored in (first, second):
            assert (scored.reward, scored.error) == (0.0, "timeout")
            assert 0.5 <= scored.seconds < 8
        assert [scored.reward for scored in others] == [0.0, 0.0, 1.0, 0.0, 0.0]
        assert [scored.error for scored in others] == [""] * 5
        assert worker.num_pools == 1

    with_worker(test, timeout_s=0.5)


def test_a_clock_that_jumps_ahead_is_no_timeout_and_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool counts seconds by the wall clock: an hour passes in an instant for the answer that is being judged."""
    now, ahead_s = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + ahead_s[0])

    async def test(worker: RewardWorker) -> None:
        await worker.score(score(r"\boxed{\sqrt{4}}", "2"))  # the child is there
        judged = asyncio.create_task(worker.score(score(HOSTILE, "7")))
        await asyncio.sleep(1)
        ahead_s[0] = 3600.0
        scored = await asyncio.wait_for(judged, 15)
        assert scored.reward is None and "this host's clock was changed" in scored.error

    with_worker(test, timeout_s=30.0)


CUSTOM = """
import os, sys, time
from pathlib import Path

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
        case "list": return [1.0]
    return 0.5 if (prompt, row["answer"]) == ("2+2=", "4") else 0.25

number = 3
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A user's reward function, importable by the children."""
    (tmp_path / "our_rewards.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    yield "our_rewards:judge"


def test_a_broken_function_is_an_infrastructure_error_and_the_worker_goes_on(custom: str) -> None:
    async def test(worker: RewardWorker) -> None:
        good = score("fine", "4", prompt="2+2=")
        assert worker.score_at_once(good) is None
        assert (await worker.score(good)).reward == 0.5
        for response, error in {
            "raise": "Unpicklable: two arguments",
            "exit": "SystemExit: 0",
            "nan": "returned nan",
            "infinite": "returned inf",
            "text": "returned a str",
            "none": "returned a NoneType",
            "list": "returned a list",
            "die": "died",
            "vanish": "not judged within 1 s",  # pebble takes exit code 0 for a child that has done its tasks
            "hang": "not judged within 1 s",
        }.items():
            scored = await worker.score(score(response))
            assert scored.reward is None, response
            assert error in scored.error
        assert (await worker.score(score("true"))).reward == 1.0
        assert (await worker.score(good)).reward == 0.5

    with_worker(test, function=custom, timeout_s=1.0)


def test_a_child_killed_while_idle_is_replaced_unnoticed(custom: str) -> None:
    async def test(worker: RewardWorker) -> None:
        for _ in range(2):
            for pid in children_named(worker):
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.5)
            scored = await worker.score(score("fine"))
            assert (scored.reward, scored.error) == (0.25, "")

    with_worker(test, function=custom)


def children_named(worker: RewardWorker) -> list[int]:
    assert worker._pool is not None
    return list(worker._pool._pool_manager.worker_manager.workers)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("our_rewards:absent", "has no attribute 'absent'"),
        ("our_rewards:number", "number is a int, not a function"),
        ("no_such_module:judge", "No module named 'no_such_module'"),
        ("maths", "expected `math`, `code` or package.module:function"),
        ("our_rewards:judge:", "expected `math`, `code` or package.module:function"),
        ("our_broken:judge", "ZeroDivisionError"),
        ("our_deadly:judge", "died"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused_at_start_up(
    custom: str, tmp_path: Path, function: str, words: str
) -> None:
    (tmp_path / "our_broken.py").write_text("1 / 0")
    (tmp_path / "our_deadly.py").write_text("import os; os._exit(1)")

    async def test(worker: RewardWorker) -> None:
        pytest.fail("started")

    with pytest.raises(ConfigError, match=words) as refused:
        with_worker(test, function=function)
    assert f"reward.function = {function!r}" in str(refused.value)


# ---- the process, and a controller written by hand


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
    tmp_path: Path, test: Callable[[Hub, Peer, subprocess.Popen[bytes]], Awaitable[None]], **reward: Any
) -> None:
    """The reward process joined to a hub, and gone with all its children at the end."""
    tree = {
        "run": {"dir": str(tmp_path), "steps": 1},
        "model": {"path": "none", "context_tokens": 16},
        "data": {"train": "none"},
        "rollout": {"max_new_tokens": 8},
        "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
        "reward": reward,
    }
    (tmp_path / "config.yaml").write_text(config.dump(config.from_tree(tree)))

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
        scored = await scored_by(hub, peer, [score(text, index=n) for n, text in enumerate(responses)])
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
        assert await asyncio.to_thread(process.wait, 10) == (0 if signum == signal.SIGTERM else -signal.SIGKILL)
        assert time.monotonic() - started < 4
        wait_until_gone(left)

    with_process(tmp_path, test, timeout_s=60.0)


def test_the_process_ends_with_the_name_of_a_function_that_cannot_be_loaded(tmp_path: Path) -> None:
    async def test(hub: Hub, peer: Peer, process: subprocess.Popen[bytes]) -> None:
        assert await asyncio.to_thread(process.wait, 15) == 2
        line = "error: reward.function = 'no_such_module:judge' cannot be loaded"
        assert line in (tmp_path / "stderr").read_text()

    with_process(tmp_path, test, function="no_such_module:judge")
