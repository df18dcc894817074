"""The built-in `math` reward: 1.0 if a response's final answer equals the row's `answer`, else 0.0.

`read_answers` finds both answers, `compare_plain` decides plain numbers and words, `compare_latex`
uses math-verify for the rest. The first two take bounded time on any text and run in the reward
worker. The third may never end on an answer such as 9^{9^{9^{9}}}, so it runs in a scoring process
that can be killed (worker.py).
"""

from __future__ import annotations

import functools
import logging
import math
import re
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from megatron_async_rl.errors import DataError

MAX_TEXT_CHARS = 64 * 1024  # only this much of a response's end is searched
_MAX_NUMBER_CHARS = 64  # longer numbers are left to math-verify
_ROUNDING = Fraction(1, 1000)  # math-verify rounds to 6 places: numbers farther apart surely differ

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_FRACTION = r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-+\u2212])?"
    r"(?:\\[dt]?frac\s*\{\d{1,30}\}\s*\{\d{1,30}\}"
    rf"|(?<![\w.])(?:{_DIGITS})(?:/\d+(?!\.?\d))?)"
)
_NUMBER = re.compile(rf"([-+]?)\s*(?:({_DIGITS})|(\d+)\s*/\s*(\d+)|{_FRACTION})")
_INTEGER = re.compile(r"-?\d{1,18}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)+")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}\\]*)\}")


def read_answers(response: str, row: dict[str, Any]) -> tuple[str, str]:
    """Returns the row's answer and the response's final answer ("" if it has none).

    The final answer is the last complete \\boxed{...}, else the last number after the last `####`,
    else the last number: of several guesses only the last counts. Raises DataError if the row has
    no answer.
    """
    expected = row.get("answer")
    if isinstance(expected, float) and math.isfinite(expected):
        expected = format(Decimal(repr(expected)), "f")
    elif isinstance(expected, int) and not isinstance(expected, bool):
        expected = str(expected)
    if not isinstance(expected, str) or not (expected := _clean(_row_answer(expected))):
        raise DataError(
            f"row {row.get('id', '(without id)')!r} has no answer to compare with: its field "
            f"`answer` is {row.get('answer')!r}; it must hold a number or a text"
        )
    text = response[-MAX_TEXT_CHARS:]
    answer = _last_boxed(text)
    if answer is None:
        answer = _last_number(text.rpartition("####")[2]) or _last_number(text)
    return expected, _clean(answer)


def compare_plain(expected: str, answer: str) -> bool | None:
    """Returns whether the two are equal, None where math-verify has to decide."""
    if not answer:
        return False
    if expected == answer:
        return True
    if _INTEGER.fullmatch(expected) and _INTEGER.fullmatch(answer):
        return int(expected) == int(answer)
    words = _words(expected)
    if words is not None and (answered := _words(answer, min_letters=1)) is not None:
        # math-verify reads words as products of letters: `ten` would equal `net`
        return words == answered
    a, b = _number(expected), _number(answer)
    if a is None or b is None:
        return None
    if a == b:
        return True
    if a == int(a) and b == int(b):
        return False
    return False if abs(a - b) > _ROUNDING else None


def compare_latex(expected: str, answer: str) -> bool:
    """Returns math-verify's decision. Raises DataError if it cannot read `expected`.

    Its own timeouts are off: they use signals, which only work in the main thread. The caller must
    be able to kill this process.
    """
    parse, verify = load_math_verify()
    parsed = parse(f"\\boxed{{{expected}}}", parsing_timeout=None)
    if not parsed:
        raise DataError(f"math-verify cannot read the row's `answer` {expected!r}")
    parsed_answer = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return bool(verify(parsed, parsed_answer, timeout_seconds=None))


@functools.cache
def load_math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns math-verify's `parse` and `verify`, warmed up and silenced.

    Takes a second (it imports sympy): call it in scoring processes and tools only.
    """
    from math_verify import parse, verify

    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"sympy|latex2sympy2_extended|math_verify|antlr4")
    half = parse(r"\boxed{\frac{1}{2}}", parsing_timeout=None)
    verify(half, parse("$0.5$", parsing_timeout=None), timeout_seconds=None)
    return parse, verify


def _row_answer(text: str) -> str:
    boxed = _last_boxed(text)
    return text.rpartition("####")[2] if boxed is None else boxed


def _last_boxed(text: str) -> str | None:
    """Returns the content of the last \\boxed{...} with balanced braces, None if there is none."""
    last = text.rfind("\\boxed")
    if last < 0:
        return None
    content = _scan_boxes(text, last)
    return _scan_boxes(text, 0) if content is None else content


def _scan_boxes(text: str, start: int) -> str | None:
    """Returns the content of the balanced box that opens last at or after `start`.

    One pass over the text: a hostile response must not cost quadratic time.
    """
    best = None
    opened: list[int] = []  # per open brace: start of a box's content, -1 for other braces
    for match in _BRACES.finditer(text, start):
        token = match[0]
        if token == "{":
            opened.append(-1)
        elif token == "}":
            begin = opened.pop() if opened else -1
            if begin >= 0 and (best is None or begin > best[0]):
                best = (begin, match.start())
        elif token.startswith("\\boxed"):
            opened.append(match.end())
    return None if best is None else text[best[0] : best[1]]


def _last_number(text: str) -> str:
    last = ""
    for match in _LAST_NUMBER.finditer(text):
        last = match[0]
    return last


def _clean(answer: str) -> str:
    """Strips spaces, dollar signs, a final full stop and LaTeX's spacing commands."""
    answer = answer.strip()
    if "\\" in answer or "{" in answer:
        for space in ("\\!", "\\,", "\\;", "\\left", "\\right"):
            answer = answer.replace(space, "")
        answer = answer.replace("{,}", ",").replace("\\$", "$")
        answer = answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
        if match := _TEXT_COMMAND.fullmatch(answer):
            answer = match[1]
    return answer.replace("\u2212", "-").strip("$ \t\n").rstrip(".").rstrip()


@functools.lru_cache(maxsize=4096)
def _number(text: str) -> Fraction | None:
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, decimal, above, below, frac_above, frac_below = match.groups()
    if decimal is not None:
        return Fraction(Decimal(sign + decimal.replace(",", "")))
    denominator = int(below or frac_below)
    if denominator == 0:
        return None
    return Fraction(int(sign + (above or frac_above)), denominator)


def _words(text: str, min_letters: int = 3) -> str | None:
    r"""Returns words in lower case (`yes`, \text{Evelyn}, `Monday morning`), None for a formula."""
    plain, num_commands = _TEXT_COMMAND.subn(r"\1", text)
    plain = " ".join(plain.split())
    if _WORDS.fullmatch(plain) or (plain.isalpha() and (num_commands or len(plain) >= min_letters)):
        return plain.casefold()
    return None
