"""Decides whether two answers are equal, without sympy and in bounded time.

None means that this module cannot decide: one of the answers has a part that it does not know.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_async_rl.reward.math import formula, structure
from megatron_async_rl.reward.math.structure import (
    BasedNumber,
    Clock,
    Equation,
    Items,
    Matrix,
    Number,
    Part,
    Sequence,
    Words,
)

_RELATIVE = 1e-9  # of values in double precision
_MIN_ROUNDED_DIGITS = 6  # a decimal of fewer digits is no rounding of a fraction or root
_UNIT_POWER = re.compile(r"\^\s*\{?\s*(-?\d)")
_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?")
_CHOSEN = re.compile(
    r"(?:(?:option|choice|answer)\s*)?(?:\(\s*([A-J])\s*\)|([A-J])(?=\s*[).:]|\s*$))[\s).:,-]*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_CHOICE = re.compile(r"\([A-J]\)|\b(?:or|and)\b|^[A-J]\b")


def equal(expected: str, answer: str) -> bool | None:
    """Returns whether two normalized answers are equal, None where math-verify has to decide."""
    choice = _CHOICE.fullmatch(_plain(expected))
    if choice and (chosen := _chosen(_plain(answer))):
        return chosen == choice[1]
    try:
        gold = structure.read(expected)
    except (formula.Unreadable, formula.TooLarge, ArithmeticError, RecursionError):
        return _equal_texts(expected, answer)
    try:
        given = structure.read(answer)
    except structure._Contradiction:
        return False
    except (formula.Unreadable, formula.TooLarge, ArithmeticError, RecursionError):
        return _unread(gold, answer)
    try:
        return _equal(gold, given)
    except (formula.Unreadable, formula.TooLarge, ArithmeticError):
        return None


def _plain(text: str) -> str:
    return structure.normal_form.unwrap_text(text)


def _chosen(text: str) -> str:
    match = _CHOSEN.fullmatch(text)
    if match is None or _OTHER_CHOICE.search(match[3]):
        return ""
    return (match[1] or match[2]).upper()


def _equal_texts(expected: str, answer: str) -> bool | None:
    squeezed = [re.sub(r"[\s{}]", "", _plain(text)).casefold() for text in (expected, answer)]
    return True if squeezed[0] == squeezed[1] else None


def _unread(gold: Part, answer: str) -> bool | None:
    """The answer cannot be read: words never equal it, and neither do numbers with other words."""
    if isinstance(gold, Words):
        return False
    return None


def _equal(gold: Part, given: Part) -> bool | None:
    if isinstance(gold, Items) or isinstance(given, Items):
        return _equal_items(gold, given)
    if isinstance(gold, BasedNumber) or isinstance(given, BasedNumber):
        return _equal_based(gold, given)
    if isinstance(gold, Equation) or isinstance(given, Equation):
        return _equal_equations(gold, given)
    if isinstance(gold, Number) and isinstance(given, Number):
        return _equal_numbers(gold, given)
    if isinstance(gold, Sequence) and isinstance(given, Sequence):
        if gold.brackets != given.brackets or len(gold.items) != len(given.items):
            return False
        return _all(_equal(a, b) for a, b in zip(gold.items, given.items, strict=True))
    if isinstance(gold, Matrix) and isinstance(given, Matrix):
        if gold.is_determinant != given.is_determinant:
            return None
        if [len(row) for row in gold.rows] != [len(row) for row in given.rows]:
            return False
        pairs = zip(gold.rows, given.rows, strict=True)
        return _all(_equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))
    if isinstance(gold, Clock) and isinstance(given, Clock):
        halves = {gold.half, given.half} - {""}
        return gold.numbers == given.numbers and len(halves) < 2
    if isinstance(gold, Words) and isinstance(given, Words):
        return gold.text == given.text
    if isinstance(gold, Words) or isinstance(given, Words):
        return False
    if isinstance(gold, Number) and isinstance(given, Sequence):
        return False
    if isinstance(gold, Sequence) and isinstance(given, Number):
        return False
    return None


def _all(results: object) -> bool | None:
    unknown = False
    for result in results:  # type: ignore[attr-defined]
        if result is False:
            return False
        unknown = unknown or result is None
    return None if unknown else True


def _equal_items(gold: Part, given: Part) -> bool | None:
    """Compares lists, sets and unions in any order; their kinds may differ but for unions."""
    if isinstance(gold, Items) and isinstance(given, Items):
        if (gold.kind == "union") != (given.kind == "union"):
            return False
        return _match_all(gold.items, given.items)
    items, other = (gold, given) if isinstance(gold, Items) else (given, gold)
    assert isinstance(items, Items)
    if items.kind == "list" and isinstance(other, Sequence):
        # a tuple without its brackets, in the same order; an interval needs them
        if other.brackets != "()" or len(other.items) != len(items.items):
            return False
        if any(isinstance(item, Number) and _is_infinite(item) for item in other.items):
            return False
        pairs = zip(items.items, other.items, strict=True)
        return _all(_equal(a, b) if items is gold else _equal(b, a) for a, b in pairs)
    if len(items.items) == 1:
        return _equal(items.items[0], other) if items is gold else _equal(other, items.items[0])
    if items is gold and items.kind == "list" and isinstance(other, Words | Clock):
        return None
    return False


def _match_all(left: tuple[Part, ...], right: tuple[Part, ...]) -> bool | None:
    if len(left) != len(right):
        return False
    remaining, unknown = list(right), False
    for item in left:
        results = [_equal(item, other) for other in remaining]
        if True in results:
            del remaining[results.index(True)]
        elif None in results:
            unknown = True
        else:
            return False
    return None if unknown else True


def _equal_based(gold: Part, given: Part) -> bool | None:
    if isinstance(gold, BasedNumber) and isinstance(given, BasedNumber):
        return gold == given
    if isinstance(gold, BasedNumber):
        # the question names the base; digits without one are read in it
        return isinstance(given, Number) and given.text.upper().lstrip("0") == gold.digits
    assert isinstance(given, BasedNumber)
    if not isinstance(gold, Number):
        return None if isinstance(gold, Equation) else False
    try:
        return formula.value(gold.node, {}) == int(given.digits, given.base)
    except (ValueError, KeyError):
        return False


def _equal_equations(gold: Part, given: Part) -> bool | None:
    if isinstance(gold, Equation) and isinstance(given, Equation):
        if gold.name and given.name and gold.left == given.left:
            return _equal(gold.right_part, given.right_part)
        return _proportional(("-", gold.left, gold.right), ("-", given.left, given.right))
    equation, other = (gold, given) if isinstance(gold, Equation) else (given, gold)
    assert isinstance(equation, Equation)
    if not isinstance(other, Number):
        return False
    return equation.name and _equal(equation.right_part, other)


def _proportional(a: formula.Node, b: formula.Node) -> bool:
    """Two equations f = 0 and g = 0 are the same if f / g is a constant."""
    names = formula.variables(a) | formula.variables(b)
    ratios = []
    for point in formula.points(names):
        above, below = formula.value(a, point), formula.value(b, point)
        if above == 0 or below == 0:
            return False
        ratios.append(complex(above) / complex(below))
    return all(_close(ratio, ratios[0]) for ratio in ratios)


def _equal_numbers(gold: Number, given: Number) -> bool | None:
    if _is_infinite(gold) or _is_infinite(given):
        return gold.node == given.node
    powers = [_UNIT_POWER.findall(number.unit) for number in (gold, given)]
    if all(powers) and powers[0] != powers[1]:
        return False  # cm^2 and cm^3
    names = formula.variables(gold.node) | formula.variables(given.node)
    if given.percent != gold.percent:
        return _equal_percent(gold, given)
    results = []
    for point in formula.points(names):
        a, b = formula.value(gold.node, point), formula.value(given.node, point)
        if not _same_value(a, b):
            results.append((a, b))
            break
    if not results:
        return True
    return not names and _is_rounding(gold, given, *results[0])


def _is_infinite(number: Number) -> bool:
    return number.node[0] == "infinity" or number.node[1:] == (("infinity",),)


def _equal_percent(gold: Number, given: Number) -> bool:
    """50% is 50 as well as 1/2: questions ask for either."""
    a, b = formula.value(gold.node, {}), formula.value(given.node, {})
    if _same_value(a, b):
        return True
    hundred = Fraction(100)
    if given.percent:
        return _same_value(a, formula.value(("/", given.node, ("number", hundred)), {}))
    return _same_value(formula.value(("/", gold.node, ("number", hundred)), {}), b)


def _same_value(a: formula.Value, b: formula.Value) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return _close(complex(a), complex(b))


def _close(a: complex, b: complex) -> bool:
    return abs(a - b) <= _RELATIVE * max(abs(a), abs(b))


def _is_rounding(gold: Number, given: Number, a: formula.Value, b: formula.Value) -> bool:
    """True if one is the other rounded or cut to at least six digits, as 0.333333 for 1/3."""
    for rounded, exact, number in ((given, gold, a), (gold, given, b)):
        if rounded.places is None or exact.places is not None or rounded.places > 300:
            continue
        digits = rounded.text.replace(",", "").lstrip("-+ ").replace(".", "").lstrip("0")
        if len(digits) < _MIN_ROUNDED_DIGITS or _terminates(number):
            continue
        difference = abs(complex(a) - complex(b))
        return difference <= 10.0**-rounded.places
    return False


def _terminates(number: formula.Value) -> bool:
    if not isinstance(number, Fraction):
        return False
    below = number.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1
