r"""Reads inequalities, set-builder notation and equations.

An inequality is the interval that it describes: a \le x < b is [a, b). Named values are compared by
their names: AB = 9, CD = 4 is not AB = 4, CD = 9.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable

from megatron_async_rl.reward.math import formula, number_equality
from megatron_async_rl.reward.math.evaluation import (
    Contradiction,
    Node,
    Unreadable,
    value,
    variables,
)
from megatron_async_rl.reward.math.numerals import read_number
from megatron_async_rl.reward.math.parts import (
    INFINITY,
    NEGATIVE_INFINITY,
    Equation,
    Items,
    Matrix,
    Number,
    Part,
    Sequence,
    is_infinite,
)

Reader = Callable[[str, int], Part]  # structure.py's, of a text at a depth

COMPARISON = re.compile(r"(\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|<=|>=|<|>)")
SET_BUILDER = re.compile(
    r"[A-Za-z]\s*(?:\\in\s*(?:\\mathbb\s*\{?\s*R\s*\}?|\(-\\infty,\\infty\))\s*)?[|:](.*)"
)
_BOUNDED = re.compile(r"\\?[A-Za-z]+(?:\s*\([a-z]\))?")
_ABSOLUTE = re.compile(r"\|\s*[A-Za-z]\s*([-+][^|A-Za-z]+)?\|")
_NAME = re.compile(
    r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\^\{?-1\}?)?'*(?:\s*\([^()=]*\))?|\\angle\s*[A-Z]+|\|[A-Z]{2}\||"
    r"\([A-Za-z, ]+\)"
)
_SUM = re.compile(r"[\w)}|]\s*[-+]\s*[\w(\\|]")
_INDEX = re.compile(r"_\{?\w+\}?")
_PART_NAME = re.compile(r"\b(?:Re|Im|arg)\b")
_COORDINATE = re.compile(r"([xyz])\s*=[^=]*")
_LOW_END, _HIGH_END = Number(NEGATIVE_INFINITY, ""), Number(INFINITY, "")


def read_inequality(text: str, depth: int, read: Reader) -> Part:
    """Returns an interval, or a union for |x| > 3."""
    pieces = COMPARISON.split(text)
    sides = [side.strip() for side in pieces[::2]]
    signs = [{"<=": "\\le", ">=": "\\ge"}.get(sign, sign) for sign in pieces[1::2]]
    if len(signs) > 2:
        raise Unreadable
    if not all(sides):
        raise Contradiction
    if len(sides) == 2 and not any(ch.isalpha() for ch in re.sub(r"\\[A-Za-z]+", "", text)):
        raise Contradiction  # 3 < 4 and 42 \ne 41 are no answers
    if all(sign in (">", "\\ge") for sign in signs) and not _ABSOLUTE.fullmatch(sides[0]):
        sides.reverse()
        signs = [{">": "<", "\\ge": "\\le"}[sign] for sign in reversed(signs)]
    is_name = [
        _BOUNDED.fullmatch(side) is not None and side not in ("\\infty", "e", "\\pi")
        for side in sides
    ]
    if len(signs) == 1 and (absolute := _ABSOLUTE.fullmatch(sides[0])):
        shift = formula.parse(absolute[1] or "0")
        return _read_absolute(signs[0], ("negative", shift), read(sides[1], depth + 1))
    if any(sign not in ("<", "\\le") for sign in signs):
        raise Unreadable
    closed = [sign == "\\le" for sign in signs]
    if len(sides) == 3 and is_name[1]:
        ends = (read(sides[0], depth + 1), read(sides[2], depth + 1))
        return Sequence("(["[closed[0]] + ")]"[closed[1]], ends, is_range=True)
    if is_name == [True, False]:
        return Sequence("(" + ")]"[closed[0]], (_LOW_END, read(sides[1], depth + 1)))
    if is_name == [False, True]:
        return Sequence("(["[closed[0]] + ")", (read(sides[0], depth + 1), _HIGH_END))
    raise Unreadable


def _read_absolute(sign: str, center: Node, radius: Part) -> Part:
    if not isinstance(radius, Number):
        raise Unreadable
    low, high = (Number((operation, center, radius.node), "") for operation in "-+")
    if sign in ("<", "\\le"):
        return Sequence("()" if sign == "<" else "[]", (low, high), is_range=True)
    if sign not in (">", "\\ge"):
        raise Unreadable
    low_half = Sequence("()" if sign == ">" else "(]", (_LOW_END, low))
    return Items("union", (low_half, Sequence("()" if sign == ">" else "[)", (high, _HIGH_END))))


def reals_without(holes: Part) -> Part:
    r"""Returns the real numbers without a number, an interval, or the items of a list or set."""
    if isinstance(holes, Sequence) and len(holes.items) == 2:
        below = Sequence("(" + ")]"[holes.brackets[0] == "("], (_LOW_END, holes.items[0]))
        above = Sequence("(["[holes.brackets[1] == ")"] + ")", (holes.items[1], _HIGH_END))
        halves = [half for half in (below, above) if half.items[0] != half.items[1]]
        return halves[0] if len(halves) == 1 else Items("union", tuple(halves))
    return _without(list(holes.items) if isinstance(holes, Items) else [holes])


def _without(holes: list[Part]) -> Part:
    if len(holes) > 1:
        holes = sorted(holes, key=_real_value)
    ends = [_LOW_END, *holes, _HIGH_END]
    return Items("union", tuple(Sequence("()", pair) for pair in itertools.pairwise(ends)))


def intersection(parts: Iterable[Part]) -> Part | None:
    r"""Returns where intervals and unions overlap, such as x > 3 and x \ne 4, else None."""
    try:
        first, *others = map(_intervals, parts)
        for other in others:
            first = [both for a in first for b in other if (both := _overlap(a, b))]
    except Unreadable:
        return None
    if len(first) < 2:
        return first[0] if first else None
    return Items("union", tuple(first))


def _intervals(part: Part) -> list[Sequence]:
    items = part.items if isinstance(part, Items) else (part,)
    intervals = [item for item in items if isinstance(item, Sequence) and len(item.items) == 2]
    if len(intervals) < len(items):
        raise Unreadable
    return intervals


def _overlap(a: Sequence, b: Sequence) -> Sequence | None:
    both = (a, b)  # of two equal ends the open one counts
    low = max(both, key=lambda one: (_end_value(one.items[0]), one.brackets[0] == "("))
    high = min(both, key=lambda one: (_end_value(one.items[1]), one.brackets[1] != ")"))
    if _end_value(low.items[0]) >= _end_value(high.items[1]):
        return None
    return Sequence(low.brackets[0] + high.brackets[1], (low.items[0], high.items[1]), True)


def _end_value(part: Part) -> float:
    if isinstance(part, Number) and is_infinite(part):
        return math.inf if part.node == INFINITY else -math.inf
    return _real_value(part)


def _real_value(part: Part) -> float:
    if not isinstance(part, Number) or is_infinite(part) or variables(part.node):
        raise Unreadable
    number = complex(value(part.node, {}))
    if number.imag:
        raise Unreadable
    return number.real


def read_equation(text: str, depth: int, read: Reader) -> Part:
    """Returns the right side if it is a value, else an Equation. Raises Contradiction."""
    sides = [side.strip() for side in text.split("=")]
    if len(sides) > 6 or not all(sides):
        raise Unreadable
    if len(sides) == 2 and not _is_name(sides[0]) and _NAME.fullmatch(sides[1]):
        sides.reverse()
    if len(sides) > 2 and (ratios := _read_equal_ratios(sides)):
        return ratios
    while len(sides) > 2 and all(map(_NAME.fullmatch, sides[:2])):
        del sides[0]  # x = q = 3
    if len(sides) > 2 and _NAME.fullmatch(sides[-1]):
        sides = [sides[-1], *sides[:-1]]  # 3 + 4 = 7 = x
    left = sides[0]
    name = _is_name(left)
    if len(sides) > 2 or not name:
        # a chain, such as m+n = 3+4 = 7, is its last one; numbers in it have to be equal
        chain = [number for side in sides if (number := _read_plain(side))]
        if any(not number_equality.equal_numbers(number, chain[-1]) for number in chain):
            raise Contradiction
        if len(sides) > 2 or len(chain) == 2:
            return read(sides[-1], depth + 1)
    right = read(sides[1], depth + 1)
    if name and isinstance(right, Number) and _SUM.search(left):
        name = False  # x + y + z = 0 is no value of a name
    elif name and not (isinstance(right, Number) and variables(right.node)):
        return right
    if not isinstance(right, Number):
        if not isinstance(right, Sequence):
            raise Unreadable
        if not _same_items(read(left, depth + 1), right):
            raise Contradiction
        return right  # (4/2, 6/2) = (2, 3)
    return Equation(_left_node(left), right.node, name, right)


def _read_equal_ratios(sides: list[str]) -> Part | None:
    """Reads a line such as (x-1)/2 = (y+2)/3 = z; None for a name with its value, or a number."""
    try:
        numbers = [read_number(side) for side in sides]
    except Unreadable:
        return None
    names = [variables(number.node) for number in numbers]
    has_own = len(set(names)) == len(sides) and all(len(own) == 1 for own in names)
    is_named = not has_own and (_is_name(sides[0]) or _NAME.fullmatch(sides[-1]))  # S = ab/2 = ah/2
    if is_named or not all(names) or all(map(_NAME.fullmatch, sides)):
        return None
    if all(number_equality.equal_numbers(number, numbers[-1]) for number in numbers):
        return None
    pairs = itertools.pairwise(numbers)
    return Items("chain", tuple(Equation(a.node, b.node, False, b) for a, b in pairs))


def _same_items(left: Part, right: Sequence) -> bool:
    if not isinstance(left, Sequence) or len(left.items) != len(right.items):
        return False
    return all(
        isinstance(a, Number) and isinstance(b, Number) and number_equality.equal_numbers(a, b)
        for a, b in zip(left.items, right.items, strict=True)
    )


def _is_name(side: str) -> bool:
    return _NAME.fullmatch(side) is not None or not re.search(r"\d", _INDEX.sub("", side))


def _read_plain(side: str) -> Number | None:
    """Returns a number without variables, None if this side is none."""
    try:
        number = read_number(side)
    except Unreadable:
        return None
    return None if is_infinite(number) or variables(number.node) else number


def _left_node(left: str) -> Node:
    try:
        return formula.parse(left)
    except Contradiction:
        raise
    except Unreadable:
        return ("variable", left)  # such as an operation of the question: 3 \# 4


def is_line(expected: str, gold: Part, given: Equation) -> bool:
    """Returns whether x - 4 = 0 is the expected x = 4, which was read as the number 4."""
    name = _COORDINATE.match(expected)
    if name is None or given.name or not isinstance(gold, Number):
        return False
    own = ("-", ("variable", name[1]), gold.node)
    return number_equality.proportional(own, ("-", given.left, given.right))


def names_other(expected: str, answer: str) -> bool:
    """Returns True for y = 2 instead of x = 2, another line, and Im z > 0 instead of Re z > 0."""
    if COMPARISON.search(expected) and COMPARISON.search(answer):
        return set(_PART_NAME.findall(expected)) != set(_PART_NAME.findall(answer))
    names = [_COORDINATE.fullmatch(text) for text in (expected, answer)]
    return names[0] is not None and names[1] is not None and names[0][1] != names[1][1]


def in_order(
    gold: Part, given: Part, names: list[str], given_names: list[str]
) -> tuple[Part, Part]:
    """Returns two lists of named values as tuples in the order of the first one's names.

    Beside a tuple, coordinates come in their own order: y = 1, x = 2 is (2, 1).
    """
    if not names:
        is_tuple = isinstance(gold, Sequence | Matrix)
        return gold, _sorted_by_name(given, given_names) if is_tuple else given
    if not given_names and isinstance(given, Sequence | Matrix):
        return _sorted_by_name(gold, names) if set(names) <= set("xyz") else gold, given
    if not (isinstance(gold, Items | Sequence) and isinstance(given, Items | Sequence)):
        return gold, given
    if len(gold.items) != len(names):
        return gold, given
    items = given.items
    if given_names and len(items) == len(names):
        items = tuple(items[given_names.index(name)] for name in names)
    return Sequence("()", gold.items), Sequence("()", items)


def _sorted_by_name(part: Part, names: list[str]) -> Part:
    """Returns y = 2, x = 1 in the order of the names, for a tuple such as (1, 2)."""
    if not isinstance(part, Items) or len(names) != len(part.items) or max(map(len, names)) > 1:
        return part
    return Items(part.kind, tuple(part.items[names.index(name)] for name in sorted(names)))
