#!/usr/bin/env python3
"""Programs per second through the sandbox of reward.function = code, beside a plain `python3` started for each.

    python tools/bench/bench_reward.py --boxes 1 2 4 --seconds 5

Every run is an honest program on one input, judged. Boxes run in threads here (a run waits for the kernel nearly all of
its time); in the product each reward child has one.
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
from megatron_async_rl.sandbox.box import Box, BoxSettings, Limits

PROGRAM = "a, b = map(int, input().split())\nprint(a + b)\n"
ANSWER = f"```python\n{PROGRAM}```"
TESTS = CodeTests("", ["3 4\n"], ["7\n"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--boxes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--python", default="/usr/bin/python3")
    arguments = parser.parse_args()
    plain = rate(1, arguments.seconds, lambda: lambda: run_plainly(arguments.python))
    row = {"cores": os.cpu_count(), "python": arguments.python, "plain_per_s": round(plain, 1)}
    for num_boxes in arguments.boxes:
        boxes = [Box(BoxSettings(arguments.python)) for _ in range(num_boxes)]
        for box in boxes:
            box.start()
        waiting = iter(boxes)
        per_s = rate(num_boxes, arguments.seconds, lambda waiting=waiting: judging(next(waiting)))
        for box in boxes:
            box.close()
        print(
            json.dumps(
                row
                | {
                    "boxes": num_boxes,
                    "judged_per_s": round(per_s, 1),
                    "ratio": round(per_s / plain, 1),
                }
            ),
            flush=True,
        )


def rate(num_threads: int, seconds: float, make: Callable[[], Callable[[], None]]) -> float:
    """Calls per second of all threads, each with a callable of its own."""
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


def judging(box: Box) -> Callable[[], None]:
    def judge() -> None:
        passes, why = code_answer.judge(box, ANSWER, TESTS, Limits(), 10.0)
        assert passes, why

    return judge


def run_plainly(python: str) -> None:
    done = subprocess.run(
        [python, "-I", "-c", PROGRAM], input=b"3 4\n", capture_output=True, check=True
    )
    assert done.stdout == b"7\n"


if __name__ == "__main__":
    main()
