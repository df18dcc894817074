r"""Removes what stands around an answer: `the area is`, `x \in`, (approximately), a conclusion.

`bare` takes an answer in the notation of normal_form.py; structure.py reads the rest.
"""

from __future__ import annotations

import re

from megatron_async_rl.reward.math import normal_form
from megatron_async_rl.reward.math.evaluation import Unreadable

_OUTWARD = re.compile(r"([\[\]])([^\[\]()]*,[^\[\]()]*)([\[\]])")  # ]1,2[ is (1,2)
_ELEMENT = re.compile(r"^\(?\\?[A-Za-z]+(?:\s*,\s*[A-Za-z])*\)?\s*\\in(?![A-Za-z])\s*")
_OF_REALS = re.compile(r"(?:,\s*|\s+for\s+)[A-Za-z]\s*\\in\s*\\mathbb\s*\{?\s*R\s*\}?$")
_FUNCTION = re.compile(r"^(?:[A-Za-z]\s*\\mapsto\s*|[fghpFGHP]\s*\(\s*[a-z]\s*\)\s*=)")
_NEGATIVE = re.compile(r"^(?:negative|minus)\s+(?=[\d\\])", re.IGNORECASE)
_REALS = re.compile(
    r"\\mathbb\s*\{?\s*R\s*\}?|(?i:(?:all|any)\s+reals?(?:\s+numbers?)?)|"
    r"\(?-\\infty\s*<\s*[a-z]\s*<\s*\\infty\)?"
)
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|sim)(?![A-Za-z])")
_BARE_NAME = re.compile(r"\s*\\?[A-Za-z]*\s*")
_LEAD = re.compile(
    r"(?:the\s+)?(?:final\s+)?(?:answer|area|length|value|volume|sum|total|result|probability|price|"
    r"cost|number|perimeter)(?:\s+is|\s*[=:])\s*(?:equal to\s+)?",
    re.IGNORECASE,
)
_COMMENT = re.compile(
    r"(?<=[\d}%\])])\s+\((?=[^()]*[A-Za-z]{4})[A-Za-z][A-Za-z'-]*(?:[\s,.]+[A-Za-z'-]+){0,8}\.?\)$"
)
_UNION_LETTER = re.compile(r"(?<=[)\]])\s*U\s*(?=[(\[])")
_POINT = re.compile(r"[A-Z]'?\s*(?=\([^()]*,[^()]*\)$)")  # A(1, 2)
# what follows a conclusion is the answer
_CONCLUSION = re.compile(
    r"^(?:=|\\equiv(?![A-Za-z]))|"
    r"^.*\\(?:Rightarrow|implies|Longrightarrow|therefore|iff|Leftrightarrow)(?![A-Za-z])",
    re.DOTALL,
)
_END_OF_WORD = re.compile(r"(?<=[A-Za-z]{3})\.$")
_DIGIT_GROUPS = re.compile(r"(?<=\d)[_'](?=\d{3}(?!\d))")


def bare(text: str) -> str:
    """Returns the answer without phrases, comments and names. Raises Unreadable if it is too long
    or nothing is left."""
    text = _CONCLUSION.sub("", normal_form.unwrap_text(text)).strip(' "')
    text = _END_OF_WORD.sub("", text)
    if not 0 < len(text) <= normal_form.MAX_CHARS:
        raise Unreadable
    if text[0].isalpha():
        text = _POINT.sub("", _LEAD.sub("", text, count=1), count=1)
        text = _NEGATIVE.sub("-", text)
        if "y" not in text:
            text = _FUNCTION.sub("y=", text)
    if "U" in text:
        text = _UNION_LETTER.sub(r"\\cup ", text)
    if "\\in" in text:
        text = _ELEMENT.sub("", _OF_REALS.sub("", text))
    if text.endswith(")"):
        text = _COMMENT.sub("", text)
    if "_" in text or "'" in text:
        text = _DIGIT_GROUPS.sub("", text)
    if "\\" in text:
        text = _exact_side(text)
    text = _REALS.sub(r"(-\\infty,\\infty)", text)
    if outward := _OUTWARD.fullmatch(text):
        text = f"{'[('[outward[1] == ']']}{outward[2]}{'])'[outward[3] == '[']}"
    return text.strip()


def _exact_side(text: str) -> str:
    if "approx" in text or "sim" in text:  # the exact value comes first
        sides = _APPROXIMATELY.split(text)
        text = next((side for side in sides if not _BARE_NAME.fullmatch(side)), text)
    return text.replace("\\langle", "(").replace("\\rangle", ")")
