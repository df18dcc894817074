"""Reads answers in words: names, yes and no, `no solution`, sets of numbers, letters of choices."""

from __future__ import annotations

import re

from megatron_async_rl.reward.math.normal_form import unwrap_text
from megatron_async_rl.reward.math.parts import Words

_WORD_TEXT = re.compile(r"[^\W\d_][^\W\d_'.-]*(?:[ ,'-]+[^\W\d_'.-]+)*")
_NO_SOLUTION = re.compile(r"(?:there (?:is|are) )?no (?:real )?solutions?(?: exists?)?")
_INFINITE = re.compile(r"(?:an )?infinite(?:ly many)?(?: (?:solutions|number))?")
_TWO_NAMES = re.compile(r"(\w+) and (\w+)")
_ARTICLE = re.compile(r"^(?:on |all )?(?:the |an |a )?")
_PLURAL = re.compile(r"(?<=[a-z]{4})(?<!s)s\b")
_NUMBER_SETS = {"Z": "integer", "Q": "rational number", "N": "positive integer"}
_NUMBER_SET = re.compile(r"\\mathbb\s*\{?\s*([ZQN])\s*\}?\s*([\^_]\s*\{?\s*(?:\+|>\s*0)\s*\}?)?")
_GROUP = re.compile(
    r"\s*\\mathbb\s*\{?\s*Z\s*\}?\s*(?:_\s*\{?\s*(\w+)\s*\}?|/\s*(\w+?)\s*\\mathbb\s*\{?\s*Z\s*\}?|"
    r"(\^\s*\{?\s*\d+\s*\}?))?\s*"
)
_PRODUCT = re.compile(r"\\oplus|\\cdot|\\bigoplus")
_VERDICT = re.compile(  # Yes, it converges
    r"(?!(?:yes|true),.*\bnot\b)(yes|no|true|false),(?!.*\b(?:yes|no|true|false|but|if|unless|except|"
    r"only|or|when|provided|assuming|sometimes|usually|mostly|most|although|though|however)\b).*",
    re.I,
)
_NO_WORDS = ("pi", "sin", "cos", "tan", "log", "infinity")
_AND_OR = re.compile(r"\b(?:and|or)\b")
_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?")
_CHOSEN = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer(?:\s+choice)?|statement)(?:\s+is)?:?\s*|选项?\s*)?"
    r"(?:\{?\(\s*([A-J])\s*\)\}?|([A-J])(?=\s*[).:]|\s*$|\s+-\s|\s+\())[\s).:,-]*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_CHOICE = re.compile(r"\([A-J]\)|\b(?:or|and)\b|^[A-J]\b|[,;]\s*[A-J][).:]")
_LABELLED = re.compile(r"\(?[A-J][).:]")
_LETTERS = re.compile(r"[A-J]{2,}")
_LETTER_LIST = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|;|and|&|,\s*and|\s)\s*\(?[A-J]\)?)+")


def read(text: str) -> Words | None:
    """Returns None for texts other than words, and for letters that may be variables."""
    if _WORD_TEXT.fullmatch(text) is None:
        return None
    letters = sum(map(str.isalpha, _AND_OR.sub("", text)))
    # BC is not CB, even as names of a segment
    is_pair = len(text) == 2 and text.isupper() and text.isalpha()
    is_short = letters < 3 and not is_pair and text.casefold() != "no"
    is_short = is_short or re.fullmatch(r"\w(?:, ?\w)+", text) is not None  # a, b, c
    if is_short or text.casefold() in _NO_WORDS:
        return None
    verdict = _VERDICT.fullmatch(text)
    return Words(_fold(text), verdict[1].casefold() if verdict else "")


def _fold(text: str) -> str:
    text = " ".join(text.casefold().replace(".", "").split()).strip(" ,")
    if names := _TWO_NAMES.fullmatch(text):
        return ", ".join(sorted(names.groups()))
    text = re.sub(r",?\s+and\s+", ", ", text)
    if text == "dne":
        return "does not exist"
    if _NO_SOLUTION.fullmatch(text):
        return "empty set"
    if _INFINITE.fullmatch(text):
        return "infinitely many"
    return _PLURAL.sub("", _ARTICLE.sub("", text))


def read_number_set(text: str) -> Words | None:
    r"""Reads \mathbb{Z}^+ as positive integers, and groups: \mathbb{Z}_2 \times \mathbb{Z}."""
    match = _NUMBER_SET.fullmatch(text)
    if match is None:
        factors = [_GROUP.fullmatch(part) for part in _PRODUCT.split(text)]
        names = [f"Z{one[1] or one[2] or ''}{one[3] or ''}" for one in factors if one]
        return Words(f"group {sorted(names)}") if len(names) == len(factors) else None
    positive = "positive " if match[2] and match[1] != "N" else ""
    return Words(positive + _NUMBER_SETS[match[1]])


def equal_choices(expected: str, answer: str) -> bool | None:
    """Returns whether the same choices are named, None if `expected` or `answer` names none."""
    if len(expected) > 30:
        return None
    gold = unwrap_text(expected)
    if choice := _CHOICE.fullmatch(gold):
        text = unwrap_text(answer)
        if chosen := _chosen(text):
            return chosen == choice[1]
        return False if _LABELLED.match(text) else None  # A) E, or several
    if _LETTER_LIST.fullmatch(gold):
        text = unwrap_text(answer)
        if "or" in text.split():
            return False
        if _LETTER_LIST.fullmatch(text) or _LETTERS.fullmatch(text):
            return sorted(re.findall("[A-J]", text)) == sorted(re.findall("[A-J]", gold))
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
