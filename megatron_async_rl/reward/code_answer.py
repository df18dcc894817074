"""The built-in `code` reward: does the program in a response pass the row's tests?

scoring_process.py calls `passes_tests`. Expected outputs stay here; only the program and the inputs
enter the sandbox. A lost sandbox (SandboxLost) is an infrastructure error, not a failed test.
"""

from __future__ import annotations

import math
import re
import time
from typing import Any

from megatron_async_rl.data.code_tests import CodeTests
from megatron_async_rl.sandbox.sandbox import End, Limits, Sandbox

_FENCE = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_PYTHON = ("python", "python3", "py")
_DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?")
TOLERANCE = 1e-6  # of numbers with a decimal point or exponent: relative, or absolute below 1
MAX_DEPTH = 100  # nesting of a returned value


def extract_program(response: str) -> str | None:
    """Returns the last block fenced as Python, else the last fenced block, else None."""
    blocks = [(language.lower(), text) for language, text in _FENCE.findall(response)]
    python = [text for language, text in blocks if language in _PYTHON]
    return (python or [text for _, text in blocks] or [None])[-1]


def passes_tests(
    sandbox: Sandbox, response: str, tests: CodeTests, limits: Limits, timeout_s: float
) -> tuple[bool, str]:
    """Returns whether the response passes all tests and, if not, the reason.

    `limits.wall_s` holds for each test, `timeout_s` for all together. Raises SandboxLost and
    SandboxError.
    """
    program = extract_program(response)
    if program is None:
        return False, "no fenced program in the answer"
    if tests.function:
        return _passes_calls(sandbox, program, tests, _within(limits, timeout_s))
    deadline = time.monotonic() + timeout_s
    for number, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), 1):
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            return False, f"test {number}: no time left"
        data = given.encode("utf-8", "replace")
        result = sandbox.run(program, data, _within(limits, remaining_s))
        if result.end is not End.OK:
            return False, f"test {number}: {result.end.value}"
        if not texts_match(result.output.decode("utf-8", "replace"), expected):
            return False, f"test {number}: wrong output"
    return True, ""


def _passes_calls(
    sandbox: Sandbox, program: str, tests: CodeTests, limits: Limits
) -> tuple[bool, str]:
    result = sandbox.run(program, tests.inputs, limits, tests.function)
    if result.end is not End.OK:
        return False, result.end.value
    pairs = zip(result.returned, tests.outputs, strict=True)
    for number, (returned, expected) in enumerate(pairs, 1):
        if not values_match(returned, expected):
            return False, f"test {number}: wrong result"
    return True, ""


def _within(limits: Limits, seconds: float) -> Limits:
    return Limits(min(limits.wall_s, seconds), limits.memory_bytes, limits.output_bytes)


def texts_match(output: str, expected: str) -> bool:
    """Compares word by word within each line; ignores extra blanks and trailing empty lines."""
    lines, expected_lines = (text.rstrip().split("\n") for text in (output, expected))
    return len(lines) == len(expected_lines) and all(map(_lines_match, lines, expected_lines))


def _lines_match(line: str, expected: str) -> bool:
    words, expected_words = line.split(), expected.split()
    return len(words) == len(expected_words) and all(map(_words_match, words, expected_words))


def _words_match(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if max(len(word), len(expected)) > 64:
        return False
    if not (_DECIMAL.fullmatch(word) and _DECIMAL.fullmatch(expected)):
        return False
    if word.lstrip("+-").isdigit() and expected.lstrip("+-").isdigit():
        return False  # integers compare exactly
    return _is_close(float(word), float(expected))


def values_match(returned: Any, expected: Any, depth: int = 0) -> bool:
    """Compares a returned value, as zygote.to_plain encodes it, with JSON data.

    Tuples match lists, dict keys are compared as text, a set matches nothing.
    """
    if depth > MAX_DEPTH:
        return False
    if any(value is None or isinstance(value, bool) for value in (returned, expected)):
        return returned is expected
    if isinstance(expected, list):
        if not isinstance(returned, list) or len(returned) != len(expected):
            return False
        return all(values_match(*pair, depth + 1) for pair in zip(returned, expected, strict=True))
    if isinstance(expected, dict):
        if not isinstance(returned, dict) or returned.keys() != {"dict"}:
            return False
        items = {str(key): value for key, value in returned["dict"]}
        return items.keys() == expected.keys() and all(
            values_match(items[key], expected[key], depth + 1) for key in expected
        )
    if isinstance(expected, float) or (isinstance(returned, float) and isinstance(expected, int)):
        return isinstance(returned, (int, float)) and _is_close(returned, expected)
    return type(returned) is type(expected) and bool(returned == expected)


def _is_close(a: float, b: float) -> bool:
    try:
        a, b = float(a), float(b)
    except OverflowError:  # an integer that no float can hold
        return False
    return math.isfinite(a) and math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
