"""Duplicates, and rows with a problem of an evaluation set, found by hashes of their words.

A row is contaminated if it shares n consecutive words with a problem of an evaluation set (n = 13
as for GPT-3, arXiv 2005.14165, appendix C). A problem of fewer words is found only as a whole.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator

_WORD = re.compile(r"[^\W_]+")
_LAYOUT = re.compile(r"\\(?:left|right|dfrac|tfrac|[,;:!])|[\s$]+")


def fingerprint(text: str) -> bytes:
    """Returns a hash of a text that does not depend on case, blanks and LaTeX's layout."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = _LAYOUT.sub(lambda match: "\\frac" if "frac" in match[0] else "", plain)
    return hashlib.blake2b(plain.encode("utf-8", "replace"), digest_size=16).digest()


class EvaluationTexts:
    """The n-grams of the problems of evaluation sets."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._places: dict[bytes, str] = {}  # hash of n words, or of a whole short text

    def add(self, text: str, place: str) -> None:
        for words in self._grams(text):
            self._places.setdefault(_hash(words), place)

    def find(self, text: str) -> tuple[str, str] | None:
        """Returns the place of a problem that shares words with the text, and these words."""
        for words in self._grams(text):
            if place := self._places.get(_hash(words)):
                return place, words
        return None

    def _grams(self, text: str) -> Iterator[str]:
        words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        for start in range(max(min(1, len(words)), len(words) - self._n + 1)):
            yield " ".join(words[start : start + self._n])


def _hash(words: str) -> bytes:
    return hashlib.blake2b(words.encode("utf-8", "replace"), digest_size=8).digest()
