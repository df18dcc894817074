"""Compares answers of multiple-choice questions: a letter, with or without its text, or several."""

from __future__ import annotations

import re

from megatron_async_rl.reward.math.normal_form import unwrap_text

_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?")
_CHOSEN = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer(?:\s+choice)?|statement)(?:\s+is)?:?\s*)?"
    r"(?:\{?\(\s*([A-J])\s*\)\}?|([A-J])(?=\s*[).:]|\s*$|\s+-\s|\s+\())[\s).:,-]*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_CHOICE = re.compile(r"\([A-J]\)|\b(?:or|and)\b|^[A-J]\b")
_LABELLED = re.compile(r"\(?[A-J][).:]")
_LETTERS = re.compile(r"[A-J]{2,}")
_LETTER_LIST = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|;|and|&|,\s*and)\s*\(?[A-J]\)?)+")


def equal(expected: str, answer: str) -> bool | None:
    """Returns whether the same choices are named, None if `expected` or `answer` names none."""
    if len(expected) > 30:
        return None
    gold = unwrap_text(expected)
    if choice := _CHOICE.fullmatch(gold):
        text = unwrap_text(answer)
        if chosen := _chosen(text):
            return chosen == choice[1]
        return False if _LABELLED.match(text) else None  # A) E, or several
    if _LETTERS.fullmatch(gold):
        text = unwrap_text(answer)
        if _LETTER_LIST.fullmatch(text):  # B, C for BC, in its order
            return re.findall("[A-J]", text) == list(gold)
    return None


def _chosen(text: str) -> str:
    match = _CHOSEN.fullmatch(text)
    if match is None or _OTHER_CHOICE.search(match[3]):
        return ""
    return (match[1] or match[2]).upper()
