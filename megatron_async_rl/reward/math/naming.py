"""Compares named values by their names: AB = 9, CD = 4 is not AB = 4, CD = 9."""

from __future__ import annotations

import re

from megatron_async_rl.reward.math.parts import Items, Part, Sequence

_COORDINATE = re.compile(r"([xyz])\s*=")
_NAMED = re.compile(r"(?:^|,|;|\band\b|\})\s*([A-Za-z]{1,3})\s*=")


def names_other_coordinate(expected: str, answer: str) -> bool:
    """True for y = 2 where x = 2 is expected: another line."""
    names = [_COORDINATE.match(text) for text in (expected, answer)]
    return names[0] is not None and names[1] is not None and names[0][1] != names[1][1]


def named_values(text: str) -> list[str]:
    """Returns the names of AB = 9, CD = 4 if they differ; x = 1, x = 2 and x_1 = 1 are a list."""
    names = _NAMED.findall(text)
    return names if len(names) > 1 and len(set(names)) == len(names) == text.count("=") else []


def in_order(
    gold: Part, given: Part, names: list[str], given_names: list[str]
) -> tuple[Part, Part]:
    """Returns two lists of named values as tuples in the order of the first one's names."""
    if not (isinstance(gold, Items) and isinstance(given, Items) and len(gold.items) == len(names)):
        return gold, given
    items = given.items
    if sorted(given_names) == sorted(names) and len(items) == len(names):
        items = tuple(items[given_names.index(name)] for name in names)
    return Sequence("()", gold.items), Sequence("()", items)
