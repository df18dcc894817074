"""Compares formulas by their values: exactly where they are rational, else to 1e-9 relative.

Values that agree so far are compared again with more digits, so that 1 - e^{-30} is not 1.
"""

from __future__ import annotations

import functools
import itertools
import re
from fractions import Fraction

import mpmath

from megatron_async_rl.reward.math.evaluation import (
    Node,
    TooLarge,
    Unreadable,
    Value,
    counts,
    inexact,
    nodes,
    points,
    rounds,
    value,
    variables,
    within_bars,
)
from megatron_async_rl.reward.math.parts import Number, Part, Sequence, is_infinite

_RELATIVE = 1e-9  # of values in double precision
_MIN_ROUNDED_DIGITS = 6  # and places, of a decimal that rounds a fraction or root
_UNIT_POWER = re.compile(r"\^\s*\{?\s*-?(\d)")
_PRECISE = {digits: mpmath.mp.clone() for digits in (100, 200, 1_000, 2_000)}
for _digits, _context in _PRECISE.items():
    _context.dps = _digits
_COARSE = 1e-9  # a larger difference comes from another branch of a root or logarithm
_MAX_NODES = 30
_DEGREE: Node = ("/", ("constant", "pi"), ("number", Fraction(180)))
_ZERO: Node = ("number", Fraction(0))
_TEN: Node = ("call", "log", ("number", Fraction(10)))


def equal_numbers(gold: Number, given: Number) -> bool:
    if is_infinite(gold) or is_infinite(given):
        return gold.node == given.node
    powers = [_UNIT_POWER.findall(number.unit) for number in (gold, given)]
    if all(powers) and powers[0] != powers[1]:
        return False  # cm^2 and cm^3
    if gold.unit != given.unit and (in_radians := _in_radians(gold, given)):
        return _same_values(*in_radians)
    if given.percent != gold.percent:
        return _equal_percent(gold, given)
    if _same_values(gold.node, given.node):
        return True
    if "log" in gold.text or "log" in given.text:  # natural, or to base 10
        return _same_values(_decimal_logs(gold.node), _decimal_logs(given.node))
    if variables(gold.node) or variables(given.node):
        return False
    return _is_rounding(gold, given, value(gold.node, {}), value(given.node, {}))


def _in_radians(gold: Number, given: Number) -> tuple[Node, Node] | None:
    r"""Returns both angles if one is in degrees and the other in radians, such as \pi/6."""
    degrees, other = (gold, given) if gold.unit == "degrees" else (given, gold)
    is_angle = other.unit in ("rad", "radians") or (
        not other.unit and ("\\pi" in other.text or "arc" in other.text)
    )
    if degrees.unit != "degrees" or not is_angle or "\\pi" in degrees.text:
        return None
    return ("*", degrees.node, _DEGREE), other.node


def is_huge(node: Node) -> bool:
    """Returns whether the outermost operation gives more than MAX_BITS bits: 4608!, 2^{43200}."""
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
    first, *others = _points(a, b)
    for point in (first, *others):
        left, right = value(a, point), value(b, point)
        if not _same_value(left, right):
            return False
        # a zero may be the rest of rounding errors
        is_exact = left != 0 and isinstance(left, Fraction) and isinstance(right, Fraction)
        if not is_exact and point is first and a != b and _differ(a, b, point):
            return False
    return True


def _differ(a: Node, b: Node, at: dict[str, Fraction]) -> bool:
    """Returns whether two formulas that agree in double precision have different values at a point.

    A difference of rounding errors changes with the number of digits. False if a formula has no
    value here, jumps (a floor), takes long (Gamma), or has a decimal of 8 to 17 places, which may
    be rounded. Raises TooLarge.
    """
    parts = [*nodes(a), *nodes(b)]
    if any(one[0] == "number" and _may_be_rounded(one[1]) for one in parts):
        return False
    if rounds(a) or rounds(b) or any(one[:2] == ("call", "Gamma") for one in parts):
        return False
    try:
        size = max(1, abs(value(a, at)))
        # 1,000 for tanh 1000, which has 868 nines; long formulas would take seconds
        for digits in (100, 1_000) if len(parts) < _MAX_NODES else (100,):
            rough, fine = (
                inexact(value(("-", a, b), at, False, context), context)
                for context in (_PRECISE[digits], _PRECISE[2 * digits])
            )
            if rough or fine:
                change = abs(_PRECISE[2 * digits].convert(rough) - fine)
                return bool(change < abs(fine) / 2 < _COARSE * size)
    except (Unreadable, ArithmeticError, ValueError, RecursionError):
        pass
    return False


def _may_be_rounded(number: Fraction) -> bool:
    """True for a decimal of 8 to 17 places."""
    return 10**8 <= number.denominator <= 10**17 and 10**17 % number.denominator == 0


def _has_value(node: Node, at: dict[str, Fraction]) -> bool:
    """Returns False for such as the factorial of a negative number."""
    try:
        value(node, at)
    except (Unreadable, TooLarge, ArithmeticError):
        return False
    return True


def _points(a: Node, b: Node) -> list[dict[str, Fraction]]:
    """Returns where two formulas are compared; variables in absolute values are also negative."""
    names = variables(a) | variables(b)
    if not names:
        return [{}]
    found, is_counted = points(names), counts(a) or counts(b)
    if is_counted or rounds(a) or rounds(b):
        whole = points(names, whole=True)
        if not is_counted:  # quotients are whole: \lceil n/3 \rceil is not \lfloor n/3 \rfloor + 1
            whole.append({name: Fraction(60 // i) for i, name in enumerate(sorted(names), 1)})
        turned = dict(zip(sorted(names), sorted(names, reverse=True), strict=True))
        falling = [{turned[name]: at for name, at in point.items()} for point in whole]
        if is_counted:  # \binom{m}{n} is 0 if m is less than n
            both = [at for at in whole + falling if _has_value(a, at) and _has_value(b, at)]
            return both if len(both) > 2 else whole
        found += whole + falling
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
    """True if one is the other rounded or cut to at least six digits: 0.666667, 0.666666 of 2/3."""
    for rounded, exact, number in ((given, gold, a), (gold, given, b)):
        if rounded.places is None or exact.places is not None or rounded.places > 300:
            continue
        digits = rounded.text.replace(",", "").lstrip("-+ ").replace(".", "").lstrip("0")
        if min(len(digits), rounded.places) < _MIN_ROUNDED_DIGITS or _terminates(number):
            continue
        short, full = (complex(b), complex(a)) if rounded is given else (complex(a), complex(b))
        difference, unit = abs(short - full), 10.0**-rounded.places
        is_cut = abs(short) < abs(full) and difference < unit
        # the second term is for decimals that a program has computed
        return is_cut or difference <= 0.5 * unit + 1e-15 * abs(full)
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
    """Returns whether f / g is a constant: then f = 0 and g = 0 are the same equation."""
    ratios = []
    for point in _points(a, b):
        above, below = value(a, point), value(b, point)
        if above == 0 or below == 0:
            return False
        ratios.append(complex(above) / complex(below))
    return all(_close(ratio, ratios[0]) for ratio in ratios)


def same_ratio(a: list[Node], b: list[Node]) -> bool:
    """Returns whether each two terms have the same ratio; 0:0 is none."""
    if len(a) != len(b):
        return False
    if any(all(_same_values(term, _ZERO) for term in terms) for terms in (a, b)):
        return False
    return all(
        _same_values(("*", first[0], second[1]), ("*", second[0], first[1]))
        for first, second in itertools.combinations(zip(a, b, strict=True), 2)
    )


def is_residue_class(node: Node, residue: Fraction | None, modulus: int) -> bool:
    """Returns whether a formula such as 4k + 1 gives the numbers of a residue class."""
    names = variables(node)
    if residue is None or len(names) > 1 or modulus < 2:
        return False
    first, second = (value(node, dict.fromkeys(names, Fraction(k))) for k in range(2))
    step = second - first
    if not isinstance(first, Fraction) or abs(step) != modulus or (first - residue) % modulus:
        return False
    others = (2, -3, 7)  # 4|k| + 1 and 4k + 1 + k(k-1)(k-2) give other numbers
    return all(value(node, dict.fromkeys(names, Fraction(k))) == first + k * step for k in others)


def components(number: Number) -> Number | Sequence:
    """Returns 3i - 4j, of unit vectors, as the tuple (3, -4)."""
    names = ["vec i", "vec j", "vec k"]
    if "vec k" not in variables(number.node):
        names.pop()
    parts = [_assigned(number.node, dict.fromkeys(names, 0) | {name: 1}) for name in names]
    total = functools.reduce(lambda a, b: ("+", a, b), parts)
    doubled = _assigned(number.node, dict.fromkeys(names, -2))
    if not equal_numbers(Number(("/", doubled, ("number", Fraction(-2))), ""), Number(total, "")):
        return number  # has another term, or a product of vectors
    return Sequence("()", tuple(Number(part, "") for part in parts))


def _assigned(node: Node, numbers: dict[str, int]) -> Node:
    """Returns a formula with numbers for some of its variables."""
    if node[0] == "variable" and node[1] in numbers:
        return ("number", Fraction(numbers[node[1]]))
    return tuple(_assigned(one, numbers) if isinstance(one, tuple) else one for one in node)
