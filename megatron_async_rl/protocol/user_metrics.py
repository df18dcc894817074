"""User metrics, from a reward function or a workflow; they are written as user/NAME.

The processes that run the user's code drop invalid metrics (MetricFilter); the controller refuses a
message that has such values nevertheless (rules.py).
"""

from __future__ import annotations

import logging
import numbers
import re
from collections.abc import Mapping
from typing import Any

MAX_NAMES = 32  # of one sample, and of a run
MAX_VALUE = 1e30
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_RULE = (
    f"a metric has a name of a letter and up to 63 letters, digits, '_', '.' or '-', and a finite "
    f"number as value; a sample has at most {MAX_NAMES}"
)


def are_valid(metrics: Mapping[str, float]) -> bool:
    """Returns whether names, values and their number are within bounds."""
    return len(metrics) <= MAX_NAMES and all(
        _NAME.fullmatch(name) and abs(float(value)) <= MAX_VALUE for name, value in metrics.items()
    )


class MetricFilter:
    """Drops invalid metrics; warns once per name."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._warned: set[str] = set()

    def valid(self, metrics: Mapping[Any, Any]) -> dict[str, float]:
        """Returns the metrics that are within bounds; of too many, the first ones by name."""
        found: dict[str, float] = {}
        for name in sorted(metrics, key=str):
            value = metrics[name]
            if (
                isinstance(name, str)
                and _NAME.fullmatch(name)
                and isinstance(value, numbers.Real)
                # before a conversion, which fails for large integers; False for nan
                and abs(value) <= MAX_VALUE  # type: ignore[operator]
                and len(found) < MAX_NAMES
            ):
                found[name] = float(value)
            else:
                self._warn(str(name)[:64], value)
        return found

    def _warn(self, name: str, value: Any) -> None:
        if name not in self._warned and len(self._warned) < MAX_NAMES:
            self._warned.add(name)
            try:
                text = ascii(value)[:64]
            except Exception:  # of the object, or of an integer with more than 4,300 digits
                text = f"a {type(value).__name__}"
            self._logger.warning("metric %a = %s is left out: %s", name, text, _RULE)
