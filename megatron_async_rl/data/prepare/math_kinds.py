"""Rows of mathematical datasets: {prompt, answer} and metadata."""

from __future__ import annotations

import re
from typing import Any

from megatron_async_rl.data import math_rows
from megatron_async_rl.data.prepare.columns import Unusable, metadata, statement, text
from megatron_async_rl.errors import DataError

_METADATA = ("level", "type", "subject", "difficulty", "year", "url", "source", "data_source")
_ASKS_FOR_PROOF = re.compile(r"\b(?:prove|show) that\b", re.IGNORECASE)
_NO_ANSWER = re.compile(
    r"n/?a|none|unknown|not (?:found|provided|available|specified)|no answer", re.IGNORECASE
)
_PROOF = re.compile(r"(?:the )?proof\b|see (?:the )?(?:solution|proof)|q\.?e\.?d\b", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # no LaTeX command
_MAX_WORDS = 12  # of an answer: a longer one is prose, which no comparison verifies


def gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    """Converts a row in which `answer` is a solution that ends in #### and the result."""
    prompt = statement(row, "question")
    _, marker, answer = text(row, "answer").rpartition("####")
    if not marker:
        raise Unusable("no answer")
    return {"prompt": prompt, "answer": _checked(prompt, answer)}


def problem(row: dict[str, Any]) -> dict[str, Any]:
    """Converts a row with the answer in `answer`, else in the last box of `solution`."""
    prompt = statement(row, "problem", "question", "Problem", "Question")
    answer = row.get("answer", row.get("Answer"))
    if answer in (None, ""):
        answer = math_rows.boxed_answer(text(row, "solution", "Solution")) or ""
    elif isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # AMC's answers are read as floats from some files
    return {
        "prompt": prompt,
        "answer": _checked(prompt, answer),
        **metadata(row, *_METADATA),
    }


def _checked(prompt: str, answer: Any) -> str:
    """Returns the answer as text. Raises Unusable if there is none that can be verified."""
    try:
        found = math_rows.read_answer({"answer": answer})
    except DataError:
        raise Unusable("no answer") from None
    if _NO_ANSWER.fullmatch(found.strip(" .")):
        raise Unusable("no answer")
    num_words = len(_WORD.findall(found))
    if _PROOF.match(found) or (_ASKS_FOR_PROOF.search(prompt) and num_words > 3):
        raise Unusable("answer is a proof")
    if num_words > _MAX_WORDS:
        raise Unusable("answer is prose")
    return found
