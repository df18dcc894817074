"""Values of formulas (formula.py): exact for rational numbers, else in double precision.

Every step is bounded: `value` raises TooLarge for numbers of more than MAX_BITS.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import mpmath

MAX_BITS = 20_000

Value = Fraction | Any  # of those that are not rational complex, or a number of mpmath
Node = tuple[Any, ...]  # (operation, operands...)


class Unreadable(Exception):
    """The formula has a part that is not known."""


class Contradiction(Unreadable):
    """A statement about numbers that is not an answer, such as 42 = 41, or several numbers."""


class TooLarge(Exception):
    """A value has too many digits to be computed here."""


FUNCTIONS = {  # the names in mpmath
    **{name: name for name in "sin cos tan cot sec csc sinh cosh tanh coth ln log exp".split()},
    **{f"arc{name}": f"a{name}" for name in "sin cos tan cot sinh cosh tanh".split()},
    **{f"ar{name}": f"a{name}" for name in "sinh cosh tanh".split()},
    "Gamma": "gamma",
    "cis": "expj",
}
_TRIGONOMETRIC = frozenset(("sin", "cos", "tan", "cot", "sec", "csc", "cis"))
CONSTANTS = {"pi": "pi", "e": "e", "i": "j"}
_DOUBLES = mpmath.FPContext()
for _name in ("tanh", "asinh", "acosh", "atanh"):  # mpmath's overflows, or is missing
    setattr(_DOUBLES, _name, getattr(cmath, _name))


def read_numeral(token: str) -> Fraction:
    """Returns the exact value of a numeral. Raises TooLarge for huge exponents."""
    number = Decimal(token.replace(",", ""))
    if abs(number.adjusted()) > MAX_BITS // 4:
        raise TooLarge
    return Fraction(number)


def is_whole(node: Node) -> bool:
    if node[0] == "negative":
        node = node[1]
    return node[0] == "number" and node[1].denominator == 1


def mixed(whole: Node, fraction: Node) -> Node:
    r"""2\frac{1}{2} is 5/2; with anything but a proper fraction of numbers it is a product."""
    if whole[0] == "negative":
        return ("negative", mixed(whole[1], fraction))
    if fraction[0] == "/":
        above, below = (_unwrap(part) for part in fraction[1:])
        if above[0] == below[0] == "number" and 0 < above[1] < below[1]:
            return ("mixed", whole, fraction)
    return ("*", whole, fraction)


def _unwrap(node: Node) -> Node:
    return _unwrap(node[1]) if node[0] == "group" else node


def nodes(node: Node) -> Iterator[Node]:
    """Yields the node and all below it."""
    yield node
    for part in node[1:]:
        if isinstance(part, tuple):
            yield from nodes(part)


def variables(node: Node) -> frozenset[str]:
    return frozenset(one[1] for one in nodes(node) if one[0] == "variable")


def within_bars(node: Node) -> frozenset[str]:
    """Returns the variables in absolute values."""
    return frozenset().union(*(variables(one) for one in nodes(node) if one[0] == "abs"))


def counts(node: Node) -> bool:
    """Returns whether a formula has factorials or binomials, which are of whole numbers."""
    return any(one[0] in ("!", "binom") for one in nodes(node))


def rounds(node: Node) -> bool:
    """Returns whether a formula has floors or ceilings, which jump at whole numbers."""
    return any(one[0] in ("lfloor", "lceil") for one in nodes(node))


def points(names: frozenset[str], whole: bool = False) -> list[dict[str, Fraction]]:
    """Returns the assignments at which formulas in these variables are compared.

    No two sums of a few variables, with small factors, agree at all of them.
    """
    assignments: list[dict[str, Fraction]] = []
    for k in range(4):
        # without the last term, b would be half of a + c everywhere
        bent = [i * (i - 1) * (k**3 + 2 * i + 4) for i in range(len(names))]
        if whole:
            values = [Fraction(4 + 3 * k + (5 + k) * i + bend // 2) for i, bend in enumerate(bent)]
        else:
            above = [7 + 13 * k + 5 * i * (k + 2) + bend for i, bend in enumerate(bent)]
            values = [Fraction(number, 11 + 3 * k) for number in above]
        assignments.append(dict(zip(sorted(names), values, strict=True)))
    return assignments


def value(
    node: Node, at: dict[str, Fraction], angle: bool = False, context: Any = _DOUBLES
) -> Value:
    """Returns the value at a point. Raises TooLarge, ZeroDivisionError, and Unreadable for infinity
    and for variables that the point has not.

    `angle`: inside of a trigonometric function, where degrees are converted. `context`: mpmath's,
    of the numbers that are not rational.
    """
    kind = node[0]
    if kind == "infinity" or (kind == "variable" and node[1] not in at):
        raise Unreadable
    if kind == "number":
        return node[1]
    if kind == "variable":
        return at[node[1]]
    if kind == "constant":
        return context.mpc(getattr(context, CONSTANTS[node[1]]))
    if kind == "call":
        argument = value(node[2], at, node[1] in _TRIGONOMETRIC, context)
        return _apply(node[1], argument, context)
    first = value(node[1], at, angle, context)
    if kind == "group":
        return first
    if kind == "negative":
        return -first
    if kind == "degrees":
        return inexact(first, context) * context.pi / 180 if angle else first
    if kind == "abs":
        return abs(first) if isinstance(first, Fraction) else context.mpc(abs(first))
    if kind in ("lfloor", "lceil"):
        real = first if isinstance(first, Fraction) else first.real
        return Fraction(math.floor(real) if kind == "lfloor" else math.ceil(real))
    if kind == "!":
        return Fraction(math.factorial(_whole(first, 1_500)))
    second = value(node[2], at, angle, context)
    if kind in ("+", "mixed"):
        return _add(first, second, context)
    if kind == "-":
        return _add(first, -second, context)
    if kind == "*":
        if _both_exact(first, second):
            return first * second
        return _finite(inexact(first, context) * inexact(second, context), context)
    if kind == "/":
        if _both_exact(first, second):
            return first / second
        return _finite(inexact(first, context) / inexact(second, context), context)
    if kind == "binom":
        return Fraction(math.comb(_whole(first, 5_000), _whole(second, 5_000)))
    return _power(first, 1 / second if kind == "root" else second, context)


def inexact(number: Value, context: Any) -> Any:
    """Returns a rational number as one of the context; leaves others as they are."""
    if context is _DOUBLES:
        return complex(number)
    if isinstance(number, Fraction):
        return context.mpc(context.mpf(number.numerator) / number.denominator)
    return number


def _both_exact(a: Value, b: Value) -> bool:
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        return False
    bits = sum(x.numerator.bit_length() + x.denominator.bit_length() for x in (a, b))
    if bits > MAX_BITS:
        raise TooLarge
    return True


def _finite(number: Any, context: Any) -> Any:
    """Raises TooLarge for infinity, which would be close to every number.

    Also for an exponent of more than MAX_BITS: mpmath's sine of such a number would take hours.
    """
    size = abs(number)
    if not size < math.inf:
        raise TooLarge
    if context is not _DOUBLES and size and abs(context.mag(size)) > MAX_BITS:
        raise TooLarge
    return number


def _add(a: Value, b: Value, context: Any) -> Value:
    if _both_exact(a, b):
        return a + b
    a, b = inexact(a, context), inexact(b, context)
    total = _finite(a + b, context)
    # a sum that cancels to rounding errors is zero
    smallest = 1e-14 * max(abs(a), abs(b)) if context is _DOUBLES else 0
    return total if abs(total) > smallest else Fraction(0)


def _whole(number: Value, limit: int) -> int:
    if not isinstance(number, Fraction) or number.denominator != 1 or number < 0:
        raise Unreadable
    if number > limit:
        raise TooLarge
    return int(number)


def _apply(name: str, argument: Value, context: Any) -> Value:
    if argument == 0 and name in ("sin", "tan", "arcsin", "arctan", "sinh", "tanh"):
        return Fraction(0)
    try:
        result = getattr(context, FUNCTIONS[name])(inexact(argument, context))
        result = _finite(result, context)
    except (OverflowError, ValueError):
        raise TooLarge from None
    if context is _DOUBLES and name in _TRIGONOMETRIC and abs(result) < 1e-15 < abs(argument):
        return Fraction(0)
    return result


def _power(base: Value, exponent: Value, context: Any) -> Value:
    is_odd = isinstance(exponent, Fraction) and exponent.denominator % 2 == 1
    if is_odd and exponent.numerator == 1 < exponent.denominator and base.real < 0 == base.imag:
        return -_power(-base, exponent, context)  # the real odd root
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator == 1:
            if abs(exponent) * size > MAX_BITS:
                raise TooLarge
            return base ** int(exponent)
        if (
            base >= 0
            and exponent.denominator <= 64
            and abs(exponent) < 64
            and size < MAX_BITS // 64
        ):
            above = _exact_root(base.numerator, exponent.denominator)
            below = _exact_root(base.denominator, exponent.denominator)
            if above is not None and below is not None:
                return Fraction(above, below) ** exponent.numerator
    try:
        if base == 0:
            return Fraction(0) if exponent.real > 0 else 1 / Fraction(0)
        return _finite(inexact(base, context) ** inexact(exponent, context), context)
    except OverflowError:
        raise TooLarge from None


def _exact_root(number: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(number)
    else:
        try:
            root = round(number ** (1 / degree))
        except OverflowError:
            return None
    return root if root**degree == number else None
