"""Whether a program passes its tests. The tests' expected outputs stay here; only inputs go into the sandbox.

A verdict is 1 when every output equals the expected one, else 0, and says why. What the sandbox could not find out is no
verdict (BoxLost).
"""

from __future__ import annotations

import math
import re
import time
from typing import Any

from megatron_async_rl.data.code_tests import CodeTests
from megatron_async_rl.sandbox.box import Box, End, Limits

_FENCE = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_PYTHON = ("python", "python3", "py")
_DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?")
TOLERANCE = 1e-6  # of numbers with a decimal point or exponent: relative, or absolute below 1
MAX_DEPTH = 100  # of a result that is compared


def program_in(response: str) -> str | None:
    """The last block fenced as Python, else the last fenced block; None when there is none."""
    blocks = [(language.lower(), text) for language, text in _FENCE.findall(response)]
    chosen = [text for language, text in blocks if language in _PYTHON] or [
        text for _, text in blocks
    ]
    return chosen[-1] if chosen else None


def judge(
    box: Box, response: str, tests: CodeTests, limits: Limits, timeout_s: float
) -> tuple[bool, str]:
    """(passes, why not). `limits.wall_s` is a test's, `timeout_s` of all of them. Raises BoxLost, BoxError."""
    program = program_in(response)
    if program is None:
        return False, "no fenced program in the answer"
    if tests.function:
        return _judge_function(box, program, tests, _within(limits, timeout_s))
    deadline = time.monotonic() + timeout_s
    for number, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), 1):
        left = deadline - time.monotonic()
        if left <= 0:
            return False, f"test {number}: no time left"
        result = box.run(program, given.encode("utf-8", "replace"), _within(limits, left))
        if result.end is not End.OK:
            return False, f"test {number}: {result.end.value}"
        if not same_text(result.output.decode("utf-8", "replace"), expected):
            return False, f"test {number}: another output"
    return True, ""


def _judge_function(box: Box, program: str, tests: CodeTests, limits: Limits) -> tuple[bool, str]:
    result = box.run(program, tests.inputs, limits, tests.function)
    if result.end is not End.OK:
        return False, result.end.value
    for number, (returned, expected) in enumerate(
        zip(result.frames, tests.outputs, strict=True), 1
    ):
        if not same_data(returned, expected):
            return False, f"test {number}: another result"
    return True, ""


def _within(limits: Limits, seconds: float) -> Limits:
    return Limits(min(limits.wall_s, seconds), limits.memory_bytes, limits.output_bytes)


def same_text(output: str, expected: str) -> bool:
    """Line by line the same words; blanks at the ends of lines and empty lines at the end do not count."""
    ours, theirs = (text.rstrip().split("\n") for text in (output, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(line: str, expected: str) -> bool:
    words, wanted = line.split(), expected.split()
    return len(words) == len(wanted) and all(map(_same_word, words, wanted))


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if max(len(word), len(expected)) > 64 or not (
        _DECIMAL.fullmatch(word) and _DECIMAL.fullmatch(expected)
    ):
        return False
    if word.lstrip("+-").isdigit() and expected.lstrip("+-").isdigit():
        return False  # whole numbers are exact
    return _close(float(word), float(expected))


def same_data(returned: Any, expected: Any, depth: int = 0) -> bool:
    """A result (zygote.py's `plain`) against JSON. Tuples are lists, keys go by their text; a set equals nothing."""
    if depth > MAX_DEPTH:
        return False
    if (
        isinstance(expected, bool)
        or isinstance(returned, bool)
        or expected is None
        or returned is None
    ):
        return returned is expected
    if isinstance(expected, list):
        return (
            isinstance(returned, list)
            and len(returned) == len(expected)
            and all(
                same_data(one, other, depth + 1)
                for one, other in zip(returned, expected, strict=True)
            )
        )
    if isinstance(expected, dict):
        if not isinstance(returned, dict) or returned.keys() != {"dict"}:
            return False
        found = {str(key): value for key, value in returned["dict"]}
        return found.keys() == expected.keys() and all(
            same_data(found[k], expected[k], depth + 1) for k in expected
        )
    if isinstance(expected, float) or (isinstance(returned, float) and isinstance(expected, int)):
        return isinstance(returned, (int, float)) and _close(returned, expected)
    return type(returned) is type(expected) and bool(returned == expected)


def _close(one: float, other: float) -> bool:
    try:
        one, other = float(one), float(other)
    except OverflowError:  # a whole number beyond any float
        return False
    return math.isfinite(one) and math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
