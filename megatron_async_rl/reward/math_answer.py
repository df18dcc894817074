"""The built-in `math` reward: is the last answer of a response equal to the row's `answer`? 1.0 or 0.0.

Three parts: `read` finds both answers, `compare_plain` settles plain numbers and words at once, `compare_latex` asks
math-verify for the rest. The first two take bounded time on any text and run in the reward worker itself. The third
may run for ever on an answer such as 9^{9^{9^{9}}}: it belongs in a child that can be killed (worker.py).
"""

from __future__ import annotations

import functools
import logging
import math as _math
import re
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from megatron_async_rl.errors import DataError

MAX_TEXT_CHARS = 64 * 1024  # only so much of a response's end is looked at
_MAX_NUMBER_CHARS = 64  # a longer one is left to math-verify
_ROUNDING = Decimal(
    "1e-3"
)  # math-verify rounds decimals to 6 places; numbers farther apart than this surely differ

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_LAST_NUMBER = re.compile(
    rf"(?:(?<![\w.)\]}}])[-+\u2212])?(?:\\[dt]?frac\s*\{{\d{{1,30}}\}}\s*\{{\d{{1,30}}\}}|(?<![\w.])(?:{_DIGITS})(?:/\d+(?!\.?\d))?)"
)
_NUMBER = re.compile(
    rf"([-+]?)\s*(?:({_DIGITS})|(\d+)\s*/\s*(\d+)|\\[dt]?frac\s*\{{(\d+)\}}\s*\{{(\d+)\}})"
)
_INTEGER = re.compile(r"-?\d{1,18}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)+")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}\\]*)\}")


def math(prompt: str, response: str, row: dict[str, Any]) -> float:
    """1.0 where the response's final answer equals `row["answer"]`. Unbounded in time: see the top of this file."""
    gold, answer = read(response, row)
    verdict = compare_plain(gold, answer)
    return float(compare_latex(gold, answer) if verdict is None else verdict)


def read(response: str, row: dict[str, Any]) -> tuple[str, str]:
    """The row's answer and the response's, which is empty where it has none.

    A final answer is the last complete \\boxed{...}; without one, the last number after the last `####`; without that,
    the last number. So of several guesses only the last one counts. Raises DataError where the row has no answer.
    """
    gold = row.get("answer")
    if isinstance(gold, float) and _math.isfinite(gold):
        gold = format(Decimal(repr(gold)), "f")
    elif isinstance(gold, int) and not isinstance(gold, bool):
        gold = str(gold)
    if not isinstance(gold, str) or not (gold := _clean(_gold_answer(gold))):
        raise DataError(
            f"row {row.get('id', '(without id)')!r} has no answer to compare with: its field `answer` is "
            f"{row.get('answer')!r}; it must hold a number or a text"
        )
    text = response[-MAX_TEXT_CHARS:]
    boxed = _last_boxed(text)
    answer = (
        (_last_number(text.rpartition("####")[2]) or _last_number(text)) if boxed is None else boxed
    )
    return gold, _clean(answer)


def compare_plain(gold: str, answer: str) -> bool | None:
    """Whether the two are equal, where that can be seen at once; None where math-verify has to look."""
    if not answer:
        return False
    if gold == answer:
        return True
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    words = _words(gold)
    if words is not None and (answered := _words(answer, min_letters=1)) is not None:
        return (
            words == answered
        )  # math-verify reads words as products of letters: to it `ten` is `net`
    a, b = _number(gold), _number(answer)
    if a is None or b is None:
        return None
    if isinstance(a, Fraction) or isinstance(b, Fraction):
        a, b = Fraction(a), Fraction(b)
    if a == b:
        return True
    if a == int(a) and b == int(b):
        return False
    return False if abs(a - b) > _ROUNDING else None


def compare_latex(gold: str, answer: str) -> bool:
    """math-verify's opinion. Its own timeouts are signals, which work in no thread: they are off, the caller kills."""
    parse, verify = load_math_verify()
    expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    if not expected:
        raise DataError(f"math-verify cannot read the row's `answer` {gold!r}")
    return bool(
        verify(expected, parse(f"\\boxed{{{answer}}}", parsing_timeout=None), timeout_seconds=None)
    )


@functools.cache
def load_math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its `parse` and `verify`, warmed up and silent; takes a second (sympy), so only children and tools call it."""
    from math_verify import parse, verify

    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"sympy|latex2sympy2_extended|math_verify|antlr4")
    verify(
        parse(r"\boxed{\frac{1}{2}}", parsing_timeout=None),
        parse("$0.5$", parsing_timeout=None),
        timeout_seconds=None,
    )
    return parse, verify


def _gold_answer(gold: str) -> str:
    boxed = _last_boxed(gold)
    return gold.rpartition("####")[2] if boxed is None else boxed


def _last_boxed(text: str) -> str | None:
    """What is inside the last \\boxed{...} whose braces balance; an unfinished box is no answer."""
    last = text.rfind("\\boxed")
    if last < 0:
        return None
    content = _scan_boxes(text, last)
    return _scan_boxes(text, 0) if content is None else content


def _scan_boxes(text: str, start: int) -> str | None:
    """The balanced box that opens last at or after `start`, in one pass: text is hostile, so nothing is quadratic."""
    best = None
    opened: list[int] = []  # start of the content of each open brace; -1 for a brace that is no box
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
    """Without what writers put around an answer: spaces, dollar signs, a full stop, LaTeX's spaces in numbers."""
    answer = answer.strip()
    if "\\" in answer or "{" in answer:
        for space in ("\\!", "\\,", "\\;", "\\left", "\\right"):
            answer = answer.replace(space, "")
        answer = (
            answer.replace("{,}", ",")
            .replace("\\$", "$")
            .replace("\\dfrac", "\\frac")
            .replace("\\tfrac", "\\frac")
        )
        if match := _TEXT_COMMAND.fullmatch(answer):
            answer = match[1]
    return answer.replace("\u2212", "-").strip("$ \t\n").rstrip(".").rstrip()


@functools.lru_cache(maxsize=4096)
def _number(text: str) -> Decimal | Fraction | None:
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, decimal, above, below, frac_above, frac_below = match.groups()
    if decimal is not None:
        return Decimal(sign + decimal.replace(",", ""))
    denominator = int(below or frac_below)
    if denominator == 0:
        return None
    return Fraction(int(sign + (above or frac_above)), denominator)


def _words(text: str, min_letters: int = 3) -> str | None:
    r"""The text in lower case where it is words and no formula: `yes`, \\text{Evelyn}, `Monday morning`."""
    plain, num_commands = _TEXT_COMMAND.subn(r"\1", text)
    plain = " ".join(plain.split())
    if _WORDS.fullmatch(plain) or (plain.isalpha() and (num_commands or len(plain) >= min_letters)):
        return plain.casefold()
    return None
