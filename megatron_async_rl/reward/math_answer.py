"""The built-in `math` reward: 1.0 if a response's final answer equals the row's `answer`, else 0.0.

`read_answers` finds both answers and writes them in one notation, `compare_plain` decides all that
reward/math can read, `compare_latex` uses math-verify for the rest. The first two take bounded time
on any text and run in the reward worker. The third may never end on an answer such as
9^{9^{9^{9}}} + 1, so it runs in a scoring process that can be killed (worker.py).
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from megatron_async_rl.data import math_rows
from megatron_async_rl.errors import DataError
from megatron_async_rl.reward import final_answer
from megatron_async_rl.reward.math import equality, normal_form

THINKING_TAGS = ("<think>", "</think>")
_DECIMAL = re.compile(r"[-+]?\d{1,60}(?:\.\d{1,60})?")


def read_answers(
    response: str, row: dict[str, Any], thinking_tags: Sequence[str] = THINKING_TAGS
) -> tuple[str, str]:
    """Returns the row's answer and the response's final answer ("" if it has none), normalized.

    `thinking_tags`: opening and closing tags in turn. Raises DataError if the row has no answer.
    """
    try:
        expected = _normalize_gold(math_rows.read_answer(row))
    except DataError as e:
        raise DataError(
            f"row {row.get('id', '(without id)')!r} has no answer: {e}", "correct the row"
        ) from None
    answer = final_answer.final_answer(response, thinking_tags)
    return expected, normal_form.normalize(answer)


@functools.lru_cache(maxsize=4096)
def _normalize_gold(text: str) -> str:
    return normal_form.normalize(text)


def compare_plain(expected: str, answer: str) -> bool | None:
    """Returns whether the two are equal, None where math-verify has to decide."""
    decided = compare_text(expected, answer)
    return equality.equal(expected, answer) if decided is None else decided


def compare_text(expected: str, answer: str) -> bool | None:
    """As `compare_plain`, for equal texts and decimals alone."""
    if not answer:
        return False
    if expected == answer:
        return True
    if _DECIMAL.fullmatch(expected) and _DECIMAL.fullmatch(answer):
        return Decimal(expected) == Decimal(answer)
    return None


def compare_latex(expected: str, answer: str) -> bool:
    """Returns math-verify's decision. Raises DataError if it cannot read `expected`.

    Its own timeouts are off: they use signals, which only work in the main thread. The caller must
    be able to kill this process.
    """
    parse, verify = load_math_verify()
    parsed = parse(f"\\boxed{{{expected}}}", parsing_timeout=None)
    if not parsed:
        raise DataError(
            f"math-verify cannot read the row's `answer` {expected!r}",
            "write it as a number or as LaTeX",
        )
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
