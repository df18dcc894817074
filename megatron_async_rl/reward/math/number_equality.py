"""Compares formulas by their values: exactly where they are rational, else to 1e-9 relative."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_async_rl.reward.math.evaluation import (
    Node,
    TooLarge,
    Value,
    counts,
    points,
    value,
    variables,
    within_bars,
)
from megatron_async_rl.reward.math.parts import Number, Part, is_infinite

_RELATIVE = 1e-9  # of values in double precision
_MIN_ROUNDED_DIGITS = 6  # and places, of a decimal that rounds a fraction or root
_UNIT_POWER = re.compile(r"\^\s*\{?\s*(-?\d)")
_TEN: Node = ("call", "log", ("number", Fraction(10)))


def equal_numbers(gold: Number, given: Number) -> bool:
    if is_infinite(gold) or is_infinite(given):
        return gold.node == given.node
    powers = [_UNIT_POWER.findall(number.unit) for number in (gold, given)]
    if all(powers) and powers[0] != powers[1]:
        return False  # cm^2 and cm^3
    if given.percent != gold.percent:
        return _equal_percent(gold, given)
    if _same_values(gold.node, given.node):
        return True
    if "log" in gold.text or "log" in given.text:  # natural, or to base 10
        return _same_values(_decimal_logs(gold.node), _decimal_logs(given.node))
    if variables(gold.node) or variables(given.node):
        return False
    return _is_rounding(gold, given, value(gold.node, {}), value(given.node, {}))


def is_huge(node: Node) -> bool:
    """True if the outermost operation gives a number of more than MAX_BITS: 4608!, 2^{43200}."""
    while node[0] in ("group", "negative"):
        node = node[1]
    if variables(node) or node[0] not in ("!", "^", "binom"):
        return False
    try:
        base = value(node[1], {})
    except TooLarge:
        return False
    if node[0] == "^" and base in (0, 1, -1):
        return False
    try:
        value(node, {})
    except TooLarge:
        return True
    return False


def _same_values(a: Node, b: Node) -> bool:
    return all(_same_value(value(a, point), value(b, point)) for point in _points(a, b))


def _points(a: Node, b: Node) -> list[dict[str, Fraction]]:
    """Returns where two formulas are compared; variables in absolute values are also negative."""
    names = variables(a) | variables(b)
    if not names:
        return [{}]
    if counts(a) or counts(b):
        return points(names, whole=True)
    found = points(names)
    signed = sorted(within_bars(a) | within_bars(b))
    for factors in ((-1, -1), (9, -9), (-9, 9)) if signed else ():
        scales = {name: factors[i % 2] for i, name in enumerate(signed)}
        found += [{n: at * scales.get(n, 1) for n, at in point.items()} for point in found[:4]]
    return found


def _decimal_logs(node: Node) -> Node:
    changed = tuple(_decimal_logs(one) if isinstance(one, tuple) else one for one in node)
    return ("/", changed, _TEN) if changed[:2] == ("call", "log") else changed


def _equal_percent(gold: Number, given: Number) -> bool:
    """50% is 50 as well as 1/2: questions ask for either."""
    plain, percent = (gold.node, given.node) if given.percent else (given.node, gold.node)
    hundredth: Node = ("/", percent, ("number", Fraction(100)))
    return _same_values(plain, percent) or _same_values(plain, hundredth)


def _same_value(a: Value, b: Value) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return _close(complex(a), complex(b))


def _close(a: complex, b: complex) -> bool:
    return abs(a - b) <= _RELATIVE * max(abs(a), abs(b))


def _is_rounding(gold: Number, given: Number, a: Value, b: Value) -> bool:
    """True if one is the other rounded or cut to at least six digits, as 0.333333 for 1/3."""
    for rounded, exact, number in ((given, gold, a), (gold, given, b)):
        if rounded.places is None or exact.places is not None or rounded.places > 300:
            continue
        digits = rounded.text.replace(",", "").lstrip("-+ ").replace(".", "").lstrip("0")
        if min(len(digits), rounded.places) < _MIN_ROUNDED_DIGITS or _terminates(number):
            continue
        difference = abs(complex(a) - complex(b))
        return difference <= 10.0**-rounded.places
    return False


def _terminates(number: Value) -> bool:
    if not isinstance(number, Fraction):
        return False
    below = number.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def rational(part: Part) -> Fraction | None:
    """Returns the value of a rational number without variables."""
    if not isinstance(part, Number) or is_infinite(part) or variables(part.node):
        return None
    number = value(part.node, {})
    return number if isinstance(number, Fraction) else None


def proportional(a: Node, b: Node) -> bool:
    """Two equations f = 0 and g = 0 are the same if f / g is a constant."""
    ratios = []
    for point in _points(a, b):
        above, below = value(a, point), value(b, point)
        if above == 0 or below == 0:
            return False
        ratios.append(complex(above) / complex(below))
    return all(_close(ratio, ratios[0]) for ratio in ratios)


def same_ratio(a: list[Node], b: list[Node]) -> bool:
    if len(a) != len(b):
        return False
    return all(
        _same_values(("*", a[0], right), ("*", b[0], left))
        for left, right in zip(a[1:], b[1:], strict=True)
    )
