#!/usr/bin/env python3
"""Measures programs per second through the sandbox of reward.function = code.

    python tools/bench/bench_reward.py --sandboxes 1 2 4 --seconds 5

Each run scores a correct program on one input. For comparison, the rate of plain `python3`
processes. Here the sandboxes run in threads, which wait for the kernel nearly all of the time; in
the product each scoring process has one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_async_rl.data.code_tests import CodeTests
from megatron_async_rl.reward import code_answer
from megatron_async_rl.sandbox.sandbox import Limits, Sandbox

PROGRAM = "a, b = map(int, input().split())\nprint(a + b)\n"
ANSWER = f"```python\n{PROGRAM}```"
TESTS = CodeTests("", ["3 4\n"], ["7\n"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sandboxes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--python", default="/usr/bin/python3")
    arguments = parser.parse_args()
    plain = rate(1, arguments.seconds, lambda: lambda: run_plainly(arguments.python))
    row = {"cores": os.cpu_count(), "python": arguments.python, "plain_per_s": round(plain, 1)}
    for num_sandboxes in arguments.sandboxes:
        sandboxes = [Sandbox(arguments.python) for _ in range(num_sandboxes)]
        for sandbox in sandboxes:
            sandbox.start()
        waiting = iter(sandboxes)
        per_s = rate(
            num_sandboxes, arguments.seconds, lambda waiting=waiting: scoring(next(waiting))
        )
        for sandbox in sandboxes:
            sandbox.close()
        print(
            json.dumps(
                row
                | {
                    "sandboxes": num_sandboxes,
                    "scored_per_s": round(per_s, 1),
                    "ratio": round(per_s / plain, 1),
                }
            ),
            flush=True,
        )


def rate(num_threads: int, seconds: float, make: Callable[[], Callable[[], None]]) -> float:
    """Returns the calls per second over all threads; `make` returns the callable of a thread."""
    counts = [0] * num_threads
    deadline = time.monotonic() + seconds

    def work(number: int, call: Callable[[], None]) -> None:
        while time.monotonic() < deadline:
            call()
            counts[number] += 1

    threads = [
        threading.Thread(target=work, args=(number, make())) for number in range(num_threads)
    ]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - started)


def scoring(sandbox: Sandbox) -> Callable[[], None]:
    def score() -> None:
        passes, why = code_answer.passes_tests(sandbox, ANSWER, TESTS, Limits(), 10.0)
        assert passes, why

    return score


def run_plainly(python: str) -> None:
    done = subprocess.run(
        [python, "-I", "-c", PROGRAM], input=b"3 4\n", capture_output=True, check=True
    )
    assert done.stdout == b"7\n"


if __name__ == "__main__":
    main()
