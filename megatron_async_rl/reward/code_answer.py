"""The built-in `code` reward: does the program in a response pass the row's tests?

scoring_process.py calls `passes_tests`. Expected outputs stay here; only the program and the inputs
enter the sandbox. A lost sandbox (SandboxLost) is an infrastructure error, not a failed test.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_async_rl.data.code_tests import CodeTests
from megatron_async_rl.sandbox.sandbox import End, Limits, Sandbox

_PYTHON = re.compile(r"\W*(i?python|py|pypy)[\d.]*(?!\w)")  # at the start of a fence's info text
_TEXT = re.compile(r"\W*(text|txt|plaintext|output|stdout|console|bash|sh|shell|json)(?!\w)")
_DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[-+]?\d+", re.ASCII)
TOLERANCE = 1e-6  # of numbers with a decimal point or exponent: relative, or absolute below 1
_LIST_MARKER = re.compile(r"[-*+]|\d{1,9}[.)]")
MAX_DEPTH = 100  # nesting of a returned value
MAX_NUMBER = 10_000  # characters of a number that is compared by value


def extract_program(response: str) -> str | None:
    """Returns the last block fenced as Python, else the last fenced block, else None.

    Blocks of text or output are passed over if there are others. A block that is indented, as in
    a list or quotation, is dedented. Takes time linear in the length of the response.
    """
    blocks = _fenced_blocks(response)
    python = [block for block in blocks if _PYTHON.match(block.info)]
    others = [block for block in blocks if not _TEXT.match(block.info)]
    for chosen in (python, others, blocks):
        if chosen:
            return chosen[-1].dedented()
    return None


@dataclass
class _Block:
    prefix: str  # of the line of the opening fence
    fence: str
    info: str  # after the fence, in lower case
    lines: list[str] = field(default_factory=list)

    def dedented(self) -> str:
        lines, width = self.lines, len(self.prefix)
        if ">" in self.prefix:
            lines = [_without_quotation_mark(line) for line in lines]
        elif _is_margin(self.prefix):
            lines = [line[:width].lstrip(" \t") + line[width:] for line in lines]
        text = "".join(lines)
        first = next((line for line in lines if line.strip()), "")
        return textwrap.dedent(text) if first[:1] in (" ", "\t") else text


def _without_quotation_mark(line: str) -> str:
    before, mark, after = line.partition(">")
    return line if before.strip() or not mark else after.removeprefix(" ")


def _is_margin(text: str) -> bool:
    """Returns whether only blanks, quotation marks and a list marker stand before a fence."""
    marker = text.strip(" \t>")
    return not marker or bool(_LIST_MARKER.fullmatch(marker))


def _fenced_blocks(response: str) -> list[_Block]:
    blocks: list[_Block] = []
    is_open = False
    for line in io.StringIO(response, newline="\n"):
        text = line.rstrip()
        if is_open:
            block = blocks[-1]
            if text.endswith(block.fence):
                code = text.rstrip(block.fence[0])  # code may stand before a closing fence
                if code.strip(" \t>"):
                    block.lines.append(code)
                is_open = False
                continue
            if not text.lstrip(" \t>").startswith(block.fence):
                block.lines.append(line)
                continue
        opened = _opened_block(text)
        if opened is not None and line.endswith("\n"):
            blocks.append(opened)
            is_open = True
    return blocks


def _opened_block(line: str) -> _Block | None:
    """Returns the block that a line opens: backticks after any text, or tildes at its start."""
    start, mark = line.find("```"), "`"
    if start < 0:
        start, mark = line.find("~~~"), "~"
        if start < 0 or not _is_margin(line[:start]):
            return None
    after = line[start:].lstrip(mark)
    if "`" in after:
        return None  # code within a sentence
    fence = mark * (len(line) - start - len(after))
    return _Block(line[:start], fence, after.strip()[:40].lower())


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
    deadline = time.monotonic() + timeout_s
    if tests.function:
        limits = _adjusted(limits, timeout_s, tests.outputs)
        return _passes_calls(sandbox, program, tests, limits)
    for number, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), 1):
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            return False, f"test {number}: no time left"
        data = given.encode("utf-8", "replace")
        result = sandbox.run(program, data, _adjusted(limits, remaining_s, expected))
        if result.end is not End.OK:
            return False, f"test {number}: {result.end.value}"
        output = result.output.decode("utf-8", "replace")
        if not _matches(texts_match, output, expected):
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
        if not _matches(values_match, returned, expected):
            return False, f"test {number}: wrong result"
    return True, ""


def _matches(compare: Callable[[Any, Any], bool], output: Any, expected: Any) -> bool:
    """Returns False if the comparison raises, because of the output of the program."""
    try:
        return compare(output, expected)
    except Exception:  # such as a frame that is JSON but none of program.to_plain's
        return False


def _adjusted(limits: Limits, seconds: float, expected: Any) -> Limits:
    """Returns limits for the remaining time that leave room for the expected output."""
    output_bytes = limits.output_bytes + 2 * _max_bytes(expected)
    return replace(limits, wall_s=min(limits.wall_s, seconds), output_bytes=output_bytes)


def _max_bytes(value: Any) -> int:
    """Returns a bound on the bytes that a program writes for this value."""
    if isinstance(value, str):
        return 6 * len(value) + 8  # JSON escapes
    if isinstance(value, list):
        return 8 + sum(map(_max_bytes, value))
    if isinstance(value, dict):
        return 16 + sum(_max_bytes(key) + _max_bytes(one) + 8 for key, one in value.items())
    return 32 + (value.bit_length() // 3 if isinstance(value, int) else 0)


def texts_match(output: str, expected: str) -> bool:
    """Compares word by word within each line; ignores extra blanks, empty lines at both ends."""
    lines, expected_lines = (text.strip().split("\n") for text in (output, expected))
    return len(lines) == len(expected_lines) and all(map(_lines_match, lines, expected_lines))


def _lines_match(line: str, expected: str) -> bool:
    words, expected_words = line.split(), expected.split()
    return len(words) == len(expected_words) and all(map(_words_match, words, expected_words))


def _words_match(word: str, expected: str) -> bool:
    """Compares numbers by value, and exactly if a whole one is expected; 07 is not 7, -0 is 0."""
    if word == expected:
        return True
    if max(len(word), len(expected)) > MAX_NUMBER:
        return False
    if not (_DECIMAL.fullmatch(word) and _DECIMAL.fullmatch(expected)):
        return False
    if not _INTEGER.fullmatch(expected):
        return _is_close(float(word), float(expected))
    if _INTEGER.fullmatch(word):
        return word.lstrip("+-") == expected.lstrip("+-") == "0"
    try:
        return Decimal(word) == Decimal(expected)
    except InvalidOperation:  # an exponent beyond any decimal
        return False


def values_match(returned: Any, expected: Any, depth: int = 0) -> bool:
    """Compares a returned value, as program.to_plain encodes it, with JSON data.

    Whole numbers are exact, tuples match lists, dict keys are compared as text, a set matches
    nothing. May raise any exception if `returned` is not of that encoding.
    """
    if depth > MAX_DEPTH:
        return False
    if depth == 0 and isinstance(returned, dict) and returned.keys() == {"none_or"}:
        returned = None if expected is None else returned["none_or"]
    if any(value is None or isinstance(value, bool) for value in (returned, expected)):
        return returned is expected
    if isinstance(returned, dict) and returned.keys() == {"int"}:
        returned = int(returned["int"], 16)
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
    if isinstance(expected, int):
        return isinstance(returned, (int, float)) and returned == expected
    if isinstance(expected, float):
        return isinstance(returned, (int, float)) and (
            _is_close(returned, expected) or _rounds_to(returned, expected)
        )
    return type(returned) is type(expected) and bool(returned == expected)


def _is_close(a: float, b: float) -> bool:
    try:
        a, b = float(a), float(b)
    except OverflowError:  # an integer that no float can hold
        return False
    return math.isfinite(a) and math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _rounds_to(returned: float, expected: float) -> bool:
    """Returns whether a value gives the expected one when it is rounded to LeetCode's 5 places."""
    try:
        return round(expected, 5) == expected and abs(returned - expected) <= 5.000001e-6
    except OverflowError:  # an integer that no float can hold
        return False
