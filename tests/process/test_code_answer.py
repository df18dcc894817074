"""reward.function = code: comparison of outputs, rows of unit tests, and the reward worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from needs import SANDBOX_PYTHON
from reward_process import collect_scores, descendant_pids, wait_until_gone, with_reward_process
from tiny_model import make_model

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.datasets import SourceConfig
from megatron_async_rl.config.sections import RewardConfig, SandboxConfig
from megatron_async_rl.data.code_tests import read_tests
from megatron_async_rl.data.dataset import read_source
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.launcher.preflight import config_checks
from megatron_async_rl.protocol.hub import Hub, Peer
from megatron_async_rl.protocol.messages import ScoreRequest, ScoreResult
from megatron_async_rl.protocol.types import SampleKey
from megatron_async_rl.reward.code_answer import extract_program, texts_match, values_match
from megatron_async_rl.reward.worker import RewardWorker

SANDBOX = {"python": SANDBOX_PYTHON, "isolation": "landlock", "test_timeout_s": 4.0}
STDIO = {"tests": [{"input": "3 4\n", "output": "7\n"}, {"input": "1 1\n", "output": "2\n"}]}
FUNCTION = {
    "function": "add",
    "tests": [{"input": [3, 4], "output": 7}, {"input": ["a", "b"], "output": "ab"}],
}


def code_block(program: str) -> str:
    return f"```python\n{program}\n```"


# ---- comparison of outputs


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("no program", None),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\nand\n```python\nb\n```", "b\n"),
        ("```python\na\n```\nprints\n```\n7\n```", "a\n"),
        ("```Python3\na\n```", "a\n"),
        ("```cpp\na\n```\n```cpp\nb\n```", "b\n"),
        ("```python\nnever closed", "never closed"),
        ("~~~", None),
        ("", None),
        ("1. First:\n    ```python\n    if a:\n        b\n    ```", "if a:\n    b\n"),
        ("- ```python\n  a\n\n  b\n  ```\n", "a\n\nb\n"),
        ("> ```py\n> a\n>\n> b\n> ```", "a\n\nb\n"),
        ("\t```python\n\ta\n\t```", "a\n"),
        ("```python\n  a\n  b\n```", "a\nb\n"),
        ("```pypy3\na\n```\n```cpp\nb\n```", "a\n"),
        ("```{.python .numberLines}\na\n```\nwrites\n```\n4\n```", "a\n"),
        ("```Python 3.11\na\n```\n```\n4\n```", "a\n"),
        ("```\na\n```\n```output\n4\n```", "a\n"),
        ("```text\n4\n```", "4\n"),
        ("~~~py\na = '```'\n~~~", "a = '```'\n"),
        ("````python\na\n```\nb\n````", "a\n```\nb\n"),
        ("```python\na```", "a"),
        ("Use ```x``` here:\n```python\na\n```", "a\n"),
        ("The code: ```python\na\n```", "a\n"),
        ("```python\na\n```python\nb\n```", "b\n"),
        ("```python\r\na\r\n```\r\n", "a\r\n"),
        ("```python\na\x0cb\u2028c\n```", "a\x0cb\u2028c\n"),
    ],
)
def test_last_python_block_is_the_program(response: str, program: str | None) -> None:
    assert extract_program(response) == program


@pytest.mark.parametrize(
    "text",
    [
        "`",
        "```",
        "``` ",
        "```\n",
        "```python\n",
        "```python\na\n```\n",
        "~~~ `",
        " \n",
        "> ",
        "a` ",
    ],
)
def test_program_is_found_in_time_linear_in_the_response(text: str) -> None:
    extract_program(text * 1000)
    started = time.process_time()
    extract_program(text * ((1 << 20) // len(text)))
    assert time.process_time() - started < 5.0  # 1 MiB; quadratic time would be minutes


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("7\n", "7", True),
        ("7  \n\n\n", "7\n", True),
        (" 1   2 \n3", "1 2\n3\n", True),
        ("1 2 3", "1 2\n3", False),
        ("", "7", False),
        ("", "", True),
        ("7\n7", "7", False),
        ("07", "7", False),
        ("7.0", "7", True),
        ("0.3333333", "0.33333333333", True),
        ("0.334", "0.333", False),
        ("1e3", "1000.0", True),
        ("12345678901234567890", "12345678901234567891", False),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("inf", "1e999", False),
        ("YES", "yes", False),
        ("9" * 500_000 + ".0", "9" * 500_000, False),
        ("\n \n7", "7", True),
        ("7", "\n\n7\n", True),
        ("1\n\n2", "1\n2", False),
        ("-0", "0", True),
        ("0", "-0", True),
        ("-0.00", "0", True),
        ("2." + "6" * 90, "2.6666666667", True),
        ("2." + "6" * 90, "2.6666766667", False),
        ("123456789012345678.0", "123456789012345678", True),
        ("123456789012345677.9", "123456789012345678", False),
        ("123456789012345680.0", "123456789012345678", False),
        ("1.2345678901234568e17", "123456789012345678", False),
        ("1.23456789012345678E+17", "123456789012345678", True),
        ("6.9999999", "7", False),
        ("7.0000001", "7.0", True),
        ("1e999999999999", "7", False),
        ("1e-99999999999999999999", "0", False),
        ("7", "7e999999999999999999999", False),
        ("\u0667", "7", False),
        ("\u0667.0", "7.0", False),
    ],
)
def test_outputs_are_compared_word_by_word(output: str, expected: str, same: bool) -> None:
    assert texts_match(output, expected) is same


@pytest.mark.parametrize(
    ("returned", "expected", "same"),
    [
        (7, 7, True),
        (7.0, 7, True),
        (7, 7.0, True),
        (True, 1, False),
        (1, True, False),
        (None, None, True),
        (0, None, False),
        ("7", 7, False),
        ([1, [2]], [1, [2]], True),
        ([1], [1, 1], False),
        (0.1 + 0.2, 0.3, True),
        (float("nan"), 1.0, False),
        (10**4000, 1.0, False),
        ({"dict": [["a", 1]]}, {"a": 1}, True),
        ({"dict": [[1, 2]]}, {"1": 2}, True),
        ({"dict": [["a", 1]]}, {"a": 1, "b": 2}, False),
        ({"set": [1, 2]}, [1, 2], False),
        ([], {}, False),
        ({"dict": []}, {}, True),
        (float(10**22), 10**22, True),
        (float(10**17), 10**17 + 1, False),
        (7.0000001, 7, False),
        (6.9999999, 7.0, True),
        ({"int": hex(10**4000)}, 10**4000, True),
        ({"int": hex(10**4000)}, 10**4000 + 1, False),
        ({"int": hex(-(10**4000))}, [-(10**4000)], False),
        ({"none_or": [1]}, None, True),
        ({"none_or": [1]}, [1], True),
        ([{"none_or": 1}], [None], False),  # only a call's result, as program.py writes it
    ],
)
def test_results_are_compared_by_value(returned: Any, expected: Any, same: bool) -> None:
    assert values_match(returned, expected) is same


MALFORMED = [
    b'{"dict": 1}',
    b'{"dict": [1]}',
    b'{"dict": [[[], 1]]}',
    b'{"dict": [[1, 2, 3]]}',
    b'{"int": 7}',
    b'{"int": "x"}',
    b'{"int": []}',
    b'{"set": 1}',
    b"9" * 100_000,
    b"[" * 100_000,
    b"NaN",
    b"\xff\xfe7",
    b"",
]
WRITES_FRAME = """
import os, struct
def f(x):
    frame = {frame!r}
    os.write(3, struct.pack("<I", len(frame)) + frame)
    os._exit(0)
"""


@pytest.mark.parametrize("expected", [7, 7.5, "7", [7], {"a": 7}, None, True])
def test_malformed_result_is_the_programs_own_fault(expected: Any) -> None:
    row = {"function": "f", "tests": [{"input": [1], "output": expected}]}
    programs = [WRITES_FRAME.format(frame=frame) for frame in MALFORMED]
    programs.append(WRITES_FRAME.format(frame=b"7").replace("len(frame)", "1 << 31"))

    async def test(worker: RewardWorker) -> None:
        for program in programs:
            scored = await worker.score(score(code_block(program), row))
            assert scored.reward == 0.0, (program, scored.error)

    with_worker(test)


# ---- rows


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "no `tests`"),
        ({"tests": []}, "no `tests`"),
        ({"tests": ["assert add(1, 2) == 3"]}, "test 1 is not an object"),
        ({"tests": [{"input": "1"}]}, "test 1 is not an object with `input` and `output`"),
        ({"tests": [{"input": "1", "output": 2}]}, "test 1: `input` and `output` must be texts"),
        (
            {"function": "f", "tests": [{"input": "1", "output": 2}]},
            "test 1: `input` must be the list of arguments",
        ),
        ({"function": "f(x)", "tests": [{"input": [1], "output": 2}]}, "`function` is 'f"),
    ],
)
def test_row_without_valid_tests_is_refused(
    row: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        read_tests(row)
    config = code_config(tmp_path, STDIO, FUNCTION, row)
    with pytest.raises(DataError, match=f"row 3: {re.escape(words)}"):
        read_source(
            SourceConfig(path=config.data.train), "data.train", config, Tokenizer(config.model.path)
        )
    [check] = [check for check in config_checks(config, print) if check.name == "dataset train"]
    assert not check.ok and f"row 3: {words}" in check.detail


@pytest.mark.parametrize(
    ("python", "ok", "words"),
    [(SANDBOX_PYTHON, True, "Landlock, seccomp"), ("/no/python", False, "3.9")],
)
def test_preflight_checks_the_sandbox(python: str, ok: bool, words: str, tmp_path: Path) -> None:
    config = code_config(tmp_path, STDIO, FUNCTION, python=python)
    assert [
        p.row["tests"]
        for p in read_source(
            SourceConfig(path=config.data.train), "data.train", config, Tokenizer(config.model.path)
        )
    ] == [
        STDIO["tests"],
        FUNCTION["tests"],
    ]
    [check] = [check for check in config_checks(config, print) if check.name == "sandbox"]
    assert check.ok is ok and words in f"{check.detail} {check.remedy}"


def code_config(folder: Path, *rows: dict[str, Any], python: str = SANDBOX_PYTHON) -> Config:
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": "1+", **row}) + "\n" for row in rows))
    return configuration.from_tree(
        {
            "run": {"dir": str(folder / "run"), "steps": 1},
            "model": {"path": str(make_model(folder / "model")), "context_tokens": 64},
            "data": {"train": str(data)},
            "rollout": {"max_new_tokens": 8},
            "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
            "reward": {"function": "code"},
            "sandbox": SANDBOX | {"python": python},
        }
    )


# ---- the reward worker


def score(response: str, row: dict[str, Any]) -> ScoreRequest:
    return ScoreRequest(SampleKey(1, 2, 3, 4), response, row)


def with_worker(
    test: Callable[[RewardWorker], Awaitable[None]],
    children: int = 1,
    timeout_s: float = 20.0,
    **sandbox: Any,
) -> None:
    async def body() -> None:
        reward = RewardConfig(function="code", processes_per_worker=children, timeout_s=timeout_s)
        worker = RewardWorker(reward, SandboxConfig(**(SANDBOX | sandbox)))
        try:
            await worker.start()
            await test(worker)
        finally:
            worker.stop()

    asyncio.run(asyncio.wait_for(body(), 120))


def test_programs_and_functions_are_scored() -> None:
    adds = code_block("a, b = map(int, input().split())\nprint(a + b)")
    sums = code_block("def add(a, b): return a + b")
    cases = [
        (adds, STDIO, 1.0, ""),
        (sums, FUNCTION, 1.0, ""),
        (code_block("class Solution:\n    def add(self, a, b): return a + b"), FUNCTION, 1.0, ""),
        (code_block("print(7)"), STDIO, 0.0, "test 2: wrong output"),
        (code_block("def add(a, b): return 7"), FUNCTION, 0.0, "test 2: wrong result"),
        (code_block("def plus(a, b): return a + b"), FUNCTION, 0.0, "raised an exception"),
        (code_block("while 1: pass"), STDIO, 0.0, "test 1: took too long"),
        ("I do not know.", STDIO, 0.0, "no fenced program in the answer"),
        (adds, {"tests": []}, None, "no `tests`"),
    ]

    async def test(worker: RewardWorker) -> None:
        scored: list[ScoreResult] = await asyncio.gather(
            *(worker.score(score(text, row)) for text, row, *_ in cases)
        )
        assert [one.reward for one in scored] == [reward for *_, reward, _ in cases]
        for one, (*_, words) in zip(scored, cases, strict=True):
            assert words in one.error and (words or not one.error)
            assert one.key == SampleKey(1, 2, 3, 4)
        assert worker.score_inline(score(adds, STDIO)) is None

    with_worker(test, children=2)


def test_program_within_the_thinking_is_not_the_answer() -> None:
    right = code_block("a, b = map(int, input().split())\nprint(a + b)")
    wrong = code_block("print(7)")
    cases = [
        (f"<think>\n{right}\n</think>\n{wrong}", "", 0.0),
        (f"<think>\n{wrong}\n</think>\n{right}", "", 1.0),
        (f"{wrong}\n</think>\n{right}", "<think>", 1.0),
        (f"<think>\n{right}", "", 0.0),
        (f"{right}\n", "<think>", 0.0),
        (f"{right}\n</think>\nThat is all.", "<think>", 0.0),
    ]

    async def test(worker: RewardWorker) -> None:
        for response, opening_tag, reward in cases:
            request = ScoreRequest(SampleKey(1, 2, 3, 4), response, STDIO, opening_tag=opening_tag)
            assert (await worker.score(request)).reward == reward

    with_worker(test)


def test_scoring_deadline_bounds_many_slow_tests() -> None:
    row = {"tests": [{"input": "", "output": "1\n"}] * 80}

    async def test(worker: RewardWorker) -> None:
        scored = await worker.score(
            score(code_block("import time\ntime.sleep(0.5)\nprint(1)"), row)
        )
        assert scored.reward == 0.0 and "took too long" in scored.error
        assert 2.5 < scored.seconds < 20  # all tests would take 40 s

    with_worker(test, timeout_s=3.0)


def test_lost_sandbox_is_an_infrastructure_error() -> None:
    async def test(worker: RewardWorker) -> None:
        before = zygotes()
        slow = asyncio.create_task(
            worker.score(score(code_block("import time\ntime.sleep(60)"), STDIO))
        )
        while len(zygotes()) == len(before):  # noqa: ASYNC110  a process is watched
            await asyncio.sleep(0.02)
        for process in before:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has died with the one before
                process.kill()
        lost = await slow
        assert lost.reward is None and "the sandbox" in lost.error
        right = await worker.score(
            score(code_block("a, b = map(int, input().split())\nprint(a + b)"), STDIO)
        )
        assert right.reward == 1.0

    with_worker(test, timeout_s=60.0, test_timeout_s=60.0)


def zygotes() -> list[psutil.Process]:
    """Returns the processes of the sandboxes below this process, and of their programs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "zygote.py" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_missing_interpreter_is_refused_at_startup() -> None:
    async def never(worker: RewardWorker) -> None:
        pytest.fail("started")

    with pytest.raises(
        ConfigError,
        match=r"sandbox\.python = /no/python, sandbox\.isolation = landlock: .*No such file",
    ):
        with_worker(never, python="/no/python")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_running_program_ends_with_the_reward_process(
    tmp_path: Path, signum: signal.Signals
) -> None:
    async def test(hub: Hub, peer: Peer, process: subprocess.Popen[bytes]) -> None:
        [right] = (
            await collect_scores(
                hub, peer, [score(code_block("print(sum(map(int, input().split())))"), STDIO)]
            )
        ).values()
        assert right.reward == 1.0
        idle = len(zygotes())
        await hub.send(peer, score(code_block("while 1: pass"), STDIO))
        while len(zygotes()) == idle:  # noqa: ASYNC110  a process is watched
            await asyncio.sleep(0.02)
        left = descendant_pids(process.pid)
        process.send_signal(signum)
        await asyncio.to_thread(process.wait, 30)
        wait_until_gone(left)

    sandbox = SANDBOX | {"test_timeout_s": 60.0}
    reward = {"function": "code", "timeout_s": 60.0, "processes_per_worker": 1}
    with_reward_process(tmp_path, test, sandbox=sandbox, **reward)
