"""The answer in a dataset row, for reward.function = math.

The dataset reader checks every row with `read_answer`; a reward worker reads the answer with the
same function. `boxed_answer` also reads responses (reward/final_answer.py).
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from megatron_async_rl.errors import DataError

EMPTY_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{[\s$]*\}")
_BOX = (
    r"(?:\\(?:boxed|fbox|framebox|ovalbox|shadowbox|doublebox|tcboxmath|Aboxed|bbox)(?![A-Za-z])|"
    r"\\(?:colorbox|fcolorbox\{[\w!]{1,20}\})\{[\w!]{1,20}\}(?=\{))"
)
_BRACES = re.compile(_BOX + r"\s*(?:\[[^\[\]{}]{0,20}\]\s*){0,2}(\{)?|\\.|[{}]", re.DOTALL)
_SIMPLE_BOX = re.compile(r"\\boxed\s*\{(\s*[^{}\\$\s][^{}\\$]*)\}")
_BARE_BOX = re.compile(
    r"\s*(?:\\[dt]?frac\s*(?:\d\s*\d|\{[^{}]*\}\s*\{[^{}]*\})|\\[A-Za-z]+|[-+]?[\d.,]*\d|[A-Za-z])"
)
# the text allowed between two boxes of one answer, as in `\boxed{2} or \boxed{3}`
_BETWEEN = re.compile(
    r"(?:[\s,;:$.*&]|\\text|\\[()\[\],; ]|[{}]|\\quad|(?<![a-z\\])[a-z]\s*=|"
    r"\b(?:and|or|either|maybe|perhaps|possibly|alternatively|also|otherwise|else|could|might|may|be|it|is|the|answer|even)\b){0,24}",
    re.IGNORECASE,
)
_JOINS = re.compile(r"\b(?:and|or|maybe|perhaps|possibly|alternatively)\b|^[\s$]*[,;]", re.I)
_MAX_BOXES = 50  # of one response, from its end


def read_answer(row: dict[str, Any]) -> str:
    """Returns the row's answer as text: the content of its last box, or the text after `####`.

    Numbers are taken as text. Raises DataError with the problem of the row.
    """
    answer = row.get("answer")
    if isinstance(answer, float) and math.isfinite(answer):
        answer = format(Decimal(repr(answer)), "f")
    elif isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    if answer in (None, ""):
        raise DataError("no `answer`, which reward.function = math compares with")
    if not isinstance(answer, str):
        raise DataError(f"its field `answer` is {answer!r}; it must hold a number or a text")
    boxed = boxed_answer(answer)
    text = answer.rpartition("####")[2] if boxed is None else boxed
    if not EMPTY_BOX.sub("", text).strip(" $\\.\t\r\n"):
        raise DataError(f"its field `answer` is {answer!r}, which holds no answer")
    return text.strip()


def boxed_answer(text: str) -> str | None:
    r"""Returns the content of the last box that is complete and not empty, None if there is none.

    Boxes joined by `or`, `and` or a comma are one answer: `\boxed{2} or \boxed{3}` is "2, 3".
    """
    last = text.rfind("\\boxed")
    if simple := _SIMPLE_BOX.match(text, last) if last >= 0 else None:
        # the usual case: no other box nearby that could belong to the same answer
        is_single = text.find("box", max(0, last - 200), last) < 0
        if is_single and text.find("box", simple.end()) < 0:
            return simple[1].strip()
    boxes = _scan_boxes(text) if "box" in text else []
    if not boxes:
        return None
    end = len(boxes) - 1
    contents = [boxes[end][2]]
    for i in range(end - 1, max(-1, end - _MAX_BOXES), -1):
        between = text[boxes[i][1] : boxes[i + 1][0]]
        if len(between) > 80 or not _BETWEEN.fullmatch(between) or not _JOINS.search(between):
            break
        if boxes[i][2] not in contents:
            contents.insert(0, boxes[i][2])
    return ", ".join(contents)


def _scan_boxes(text: str) -> list[tuple[int, int, str]]:
    """Returns (start, end, content) of the complete, innermost, not empty boxes in their order.

    One pass over the text: a hostile response must not cost quadratic time.
    """
    found: list[tuple[int, int, str]] = []
    opened: list[tuple[int, int]] = []  # per open brace: start and content start of a box, or -1
    position = 0
    while match := _BRACES.search(text, position):
        token, position = match[0], match.end()
        if token == "{":
            opened.append((-1, -1))
        elif token == "}":
            start, begin = opened.pop() if opened else (-1, -1)
            # a box around another one adds nothing: the inner one was the last to open
            if begin >= 0 and not (found and found[-1][0] > start):
                content = text[begin : match.start()].strip()
                if content.strip("$ "):
                    found.append((start, match.end(), content))
        elif match[1]:
            opened.append((match.start(), match.end()))
        elif len(token) > 2 and (bare := _BARE_BOX.match(text, match.end())):
            found.append((match.start(), bare.end(), bare[0].strip()))
            position = bare.end()
    return found
