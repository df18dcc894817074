"""Logs errors that may come thousands of times a second: each different one once, with counts."""

from __future__ import annotations

import logging
import re
import traceback
from collections import Counter

MAX_DIFFERENT = 100  # further ones are counted together
MAX_TEXT = 4000  # characters


class ErrorLog:
    """Errors are the same if their first lines differ in digits only."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._counts: Counter[str] = Counter()

    def log(self, where: str, error: str) -> None:
        """Logs a new error in full, a known one when its count is a power of ten."""
        kind = re.sub(r"\d+", "#", error.partition("\n")[0])[:200]
        if kind not in self._counts and len(self._counts) >= MAX_DIFFERENT:
            kind = "other errors"
        self._counts[kind] += 1
        count = self._counts[kind]
        if count == 1:
            self._logger.warning("%s: %s", where, error)
        elif str(count).strip("0") == "1":
            self._logger.warning("%s: %s (%d times so far)", where, error.partition("\n")[0], count)


def user_error(error: BaseException) -> str:
    """Returns type and message of an error in a user's code, and its traceback below the caller."""
    below = error.__traceback__.tb_next if error.__traceback__ else None
    frames = "".join(traceback.format_tb(below))
    text = f"{type(error).__name__}: {error}\n{frames}".rstrip()[:MAX_TEXT]
    return text.encode(errors="backslashreplace").decode()  # no message can carry half a character
