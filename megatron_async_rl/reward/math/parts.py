"""The kinds of answers; `structure.read` returns one of these classes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from megatron_async_rl.reward.math.evaluation import Node


@dataclass(frozen=True)
class Number:
    """A single formula; `places`: decimal places if it is written as a decimal, else None."""

    node: Node
    text: str
    places: int | None = None
    percent: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Sequence:
    """Ordered items in their brackets: a tuple, or an interval such as `[)`.

    `is_range`: written as an inequality, so it is no tuple.
    """

    brackets: str
    items: tuple[Part, ...]
    is_range: bool = False


@dataclass(frozen=True)
class Items:
    """Items in any order: "list", "set", "union", "either" for intervals or points with `or`,
    "cases" for pairs of a value and a condition, "chain" for equations such as (x-1)/2 = y/3 = z.
    """

    kind: str
    items: tuple[Part, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Part, ...], ...]
    is_determinant: bool


@dataclass(frozen=True)
class Equation:
    left: Node
    right: Node
    name: bool  # the left side is a name, such as y or f(x)
    right_part: Part


@dataclass(frozen=True)
class BasedNumber:
    digits: str
    base: int


@dataclass(frozen=True)
class Clock:
    """A time of day: hours without a leading zero, minutes, maybe seconds, and am or pm."""

    numbers: tuple[str, ...]
    half: str  # "a", "p" or ""

    def is_same_time(self, other: Clock) -> bool:
        """3:45 is 3:45 p.m., which is 15:45."""
        halves = {self.half, other.half} - {""}
        if self.numbers == other.numbers:
            return len(halves) < 2
        return len(halves) == 1 and self._of_day() == other._of_day()

    def _of_day(self) -> tuple[int, ...]:
        hours, *rest = map(int, self.numbers)
        if self.half:
            hours = hours % 12 + (12 if self.half == "p" else 0)
        return (hours, *rest)


@dataclass(frozen=True)
class Ratio:
    terms: tuple[Number, ...]


@dataclass(frozen=True)
class Congruence:
    residue: Part
    modulus: int


@dataclass(frozen=True)
class Words:
    text: str
    verdict: str = ""  # the yes of `yes, it is`
    values: tuple[tuple[str, Fraction], ...] = ()  # of 3 hours 30 minutes, in each unit


Part = (
    Number | Sequence | Items | Matrix | Equation | BasedNumber | Clock | Ratio | Congruence | Words
)

INFINITY: Node = ("infinity",)
NEGATIVE_INFINITY: Node = ("negative", INFINITY)


def is_infinite(number: Number) -> bool:
    return number.node in (INFINITY, NEGATIVE_INFINITY)


def is_interval(part: Part) -> bool:
    return isinstance(part, Sequence) and len(part.items) == 2


def as_matrix(part: Part) -> Matrix | None:
    """Returns a matrix; a tuple is a column vector, [[1, 2], [3, 4]] has two rows."""
    if isinstance(part, Matrix):
        return part
    if not isinstance(part, Sequence) or part.is_range or part.brackets not in ("()", "[]"):
        return None
    rows = [item.items for item in part.items if isinstance(item, Sequence)]
    if len(rows) == len(part.items):
        return Matrix(tuple(rows), is_determinant=False)
    return Matrix(tuple((item,) for item in part.items), is_determinant=False)
