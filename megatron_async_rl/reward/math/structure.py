r"""Splits an answer into its parts: lists, tuples, sets, intervals, matrices, equations, bases.

`read` returns one of the frozen classes below for an answer in the notation of normal_form.py.
An inequality becomes the interval that it describes, and 3 \pm 2 a list of two.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_async_rl.reward.math import formula, normal_form


@dataclass(frozen=True)
class Number:
    """A single formula; `places`: decimal places if it is written as a decimal, else None."""

    node: formula.Node
    text: str
    places: int | None = None
    percent: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Sequence:
    """Ordered items in their brackets: a tuple, or an interval such as `[)`."""

    brackets: str
    items: tuple[Part, ...]


@dataclass(frozen=True)
class Items:
    """Items in any order: a list, a set or a union."""

    kind: str  # "list", "set" or "union"
    items: tuple[Part, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Part, ...], ...]
    is_determinant: bool


@dataclass(frozen=True)
class Equation:
    left: formula.Node
    right: formula.Node
    name: bool  # the left side is a name, such as y or f(x)
    right_part: Part


@dataclass(frozen=True)
class BasedNumber:
    digits: str
    base: int


@dataclass(frozen=True)
class Clock:
    """A time of day or a ratio: numbers with colons, and am or pm."""

    numbers: tuple[str, ...]
    half: str


@dataclass(frozen=True)
class Words:
    text: str


Part = Number | Sequence | Items | Matrix | Equation | BasedNumber | Clock | Words

_INFINITY: formula.Node = ("infinity",)
_MAX_ITEMS = 60
_SPLIT_WORDS = re.compile(r"\s+(?:and|or)\s+|\s*;\s*|\\text\s*\{\s*(?:and|or)\s*\}")
_JOIN = re.compile(r",\s*(?:and|or)\s+")
_BRACKETS = {"\\{": ("\\}",), "\\langle": ("\\rangle",), "(": (")", "]"), "[": (")", "]")}
_OPEN, _CLOSE = "([{", ")]}"
_BASE = re.compile(
    r"(-?)(?:\(\s*([0-9A-Za-z]+)\s*\)|([0-9A-Fa-f]+|[0-9A-Z]+))\s*_\s*(?:\{\s*(\w+)\s*\}|(\d+))"
)
_BASE_WORDS = re.compile(r"(-?)([0-9A-F]+)\s*\(?\s*(?:in\s+)?base\s*[-_]?\s*(\w+)\s*\)?")
_BASE_NAMES = {
    name: base
    for base, name in enumerate(
        "two three four five six seven eight nine ten eleven twelve".split(), start=2
    )
}
_CLOCK = re.compile(
    r"(\d+(?:\s*:\s*\d+)+)\s*(?:([ap])\.?\s*m\.?)?|(\d+)\s*([ap])(?:\.\s*m|m)\b\.?", re.IGNORECASE
)
_WORD_TEXT = re.compile(r"[^\W\d_][^\W\d_'.-]*(?:[ ,'-]+[^\W\d_'.-]+)*")
_NAME = re.compile(
    r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*(?:\s*\([^()=]*\))?|\\angle\s*[A-Z]+|\|[A-Z]{2}\||"
    r"\([A-Za-z, ]+\)"
)
_DECIMAL = re.compile(r"[-+]?\s*(?:\d[\d,]*)?\.(\d+)")
_COMPARISON = re.compile(r"(\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|<=|>=|<|>)")
_MATRIX = re.compile(
    r"\\begin\s*\{([pbvBV]?)matrix\}(.*)\\end\s*\{\1matrix\}|"
    r"\(?\s*\\begin\s*\{array\}\s*\{[^{}]*\}(.*)\\end\s*\{array\}\s*\)?",
    re.DOTALL,
)
_MIXED = re.compile(r"([-+]?\s*\d+)\s+(\d+)\s*/\s*(\d+)")
_REPEATING = re.compile(r"([-+]?\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?(?:\\ldots|\.\.\.)?")
_SPACED_NUMBER = re.compile(r"\d{1,3}(?: \d{3})+")
_SCALE = re.compile(r"([-+]?[\d.,]*\d)\s*(hundred|thousand|million|billion|trillion|dozen)\b", re.I)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SCALES |= {"trillion": 10**12, "dozen": 12}
_ELEMENT = re.compile(r"\(?[A-Za-z](?:\s*,\s*[A-Za-z])*\)?\s*\\in(?![A-Za-z])\s*")
_REALS = re.compile(
    r"\\mathbb\s*\{?\s*R\s*\}?|all real numbers|\(?-\\infty\s*<\s*[a-z]\s*<\s*\\infty\)?"
)
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|sim)(?![A-Za-z])")
_LEAD = re.compile(
    r"(?:the\s+)?(?:final\s+)?(?:answer|area|length|value|volume|sum|total|result|probability|price|"
    r"cost|number|perimeter)(?:\s+is|\s*[=:])\s*(?:equal to\s+)?",
    re.IGNORECASE,
)


@functools.lru_cache(maxsize=8192)
def read(text: str) -> Part:
    """Returns the structure of an answer. Raises formula.Unreadable or formula.TooLarge."""
    text = re.sub(r"(?<=\d)_(?=\d{3}\b)", "", normal_form.unwrap_text(text))
    if len(text) > normal_form.MAX_CHARS or not text:
        raise formula.Unreadable
    text = _LEAD.sub("", text, count=1) if text[0].isalpha() else text
    text = _ELEMENT.sub("", text, count=1)
    if "\\approx" in text:  # the exact value comes first
        text = next((part for part in _APPROXIMATELY.split(text) if part.strip()), text)
    text = _REALS.sub(r"(-\\infty,\\infty)", text)
    return _read(text.strip(), depth=0)


def _read(text: str, depth: int) -> Part:
    if depth > 6 or not text:
        raise formula.Unreadable
    text = text.strip()
    if words := _words(text):
        return words
    if matrix := _MATRIX.fullmatch(text):
        return _read_matrix(matrix, depth)
    if "\\cup" in text:
        return Items("union", _read_all(re.split(r"\\cup(?![A-Za-z])", text), depth))
    if " and " in text or " or " in text or ";" in text:
        text = _JOIN.sub(", ", text)
        parts = [part for part in _SPLIT_WORDS.split(text) if part and part.strip()]
        parts = [piece for part in parts for piece in _split_commas(part)]
        return _list_of(parts, depth)
    if based := _read_base(text):
        return based
    if clock := _CLOCK.fullmatch(text):
        numbers = tuple(part.strip() for part in (clock[1] or clock[3]).split(":"))
        return Clock(numbers, (clock[2] or clock[4] or "").lower())
    if "," in text:
        parts = _split_commas(text)
        if len(parts) > 1:
            return _list_of(parts, depth)
    if sequence := _read_brackets(text, depth):
        return sequence
    if "\\pm" in text or "\\mp" in text:
        return _list_of(
            [_choose_signs(text, "+", "-"), _choose_signs(text, "-", "+")], depth, signs=True
        )
    if _COMPARISON.search(text):
        return _read_inequality(text, depth)
    if "=" in text:
        return _read_equation(text, depth)
    return _read_number(text)


def _words(text: str) -> Words | None:
    if _WORD_TEXT.fullmatch(text) is None:
        return None
    letters = sum(map(str.isalpha, text))
    is_pair = (
        len(text) == 2 and text.isupper() and text.isalpha()
    )  # BC is not CB, whatever they name
    if (letters < 3 and not is_pair) or text in ("pi", "sin", "cos", "tan", "log"):
        return None
    return Words(fold_words(text))


def fold_words(text: str) -> str:
    text = " ".join(text.casefold().replace(".", "").split()).strip(" ,")
    return re.sub(r"^(?:the|an|a)\s+", "", text)


def _read_all(parts: list[str], depth: int) -> tuple[Part, ...]:
    if len(parts) > _MAX_ITEMS:
        raise formula.Unreadable
    return tuple(_read(part, depth + 1) for part in parts)


def _list_of(parts: list[str], depth: int, signs: bool = False) -> Items:
    items = _read_all(parts, depth)
    if (
        not signs
        and all(
            (isinstance(item, Items) and item.kind == "union") or _is_interval(item)
            for item in items
        )
        and any(_COMPARISON.search(part) for part in parts)
    ):
        flat = [p for item in items for p in (item.items if isinstance(item, Items) else (item,))]
        return Items("union", tuple(flat))
    flat = []
    for item in items:
        flat += item.items if isinstance(item, Items) and item.kind == "list" else (item,)
    return Items("list", tuple(flat))


def _is_interval(part: Part) -> bool:
    return isinstance(part, Sequence) and len(part.items) == 2


def _split_commas(text: str) -> list[str]:
    """Splits at commas outside of all brackets; a comma between thousands separates nothing."""
    parts, depth, begin = [], 0, 0
    for i, ch in enumerate(text):
        if ch in _OPEN:
            depth += 1
        elif ch in _CLOSE:
            depth -= 1
        elif ch == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    parts.append(text[begin:])
    if len(parts) > 1 and _is_thousands(text):
        return [text]
    return [part.strip() for part in parts if part.strip()]


def _is_thousands(text: str) -> bool:
    return re.match(
        r"(?:[^,=]{1,40}=)?\s*[-+]?\s*\d{1,3}(?:,\d{3})+(?![\d,]|\s*,)", text
    ) is not None and not re.search(r",(?!\d{3}(?!\d))", text)


def _read_brackets(text: str, depth: int) -> Part | None:
    opening = next((opening for opening in _BRACKETS if text.startswith(opening)), None)
    if opening is None:
        return None
    ending = next((end for end in _BRACKETS[opening] if text.endswith(end)), None)
    if ending is None or not _closes_at_end(text, opening, ending):
        return None
    inner = text[len(opening) : -len(ending)].strip()
    parts = _split_all_commas(inner)
    if opening == "\\{":
        if not inner:
            return Words("empty set")
        return Items("set", _read_all(parts, depth))
    if len(parts) == 1:
        if opening == "(" and ending == ")" and "|" not in inner:
            inside = _read(inner, depth + 1)
            return inside if not isinstance(inside, Number) else None
        return None
    brackets = "()" if opening == "\\langle" else opening + ending
    return Sequence(brackets, _read_all(parts, depth))


def _split_all_commas(text: str) -> list[str]:
    """As _split_commas, but every comma separates: (1,234) has two items."""
    parts, depth, begin = [], 0, 0
    for i, ch in enumerate(text):
        if ch in _OPEN:
            depth += 1
        elif ch in _CLOSE:
            depth -= 1
        elif ch == "," and depth == 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
    parts.append(text[begin:].strip())
    return parts


def _closes_at_end(text: str, opening: str, ending: str) -> bool:
    depth = 0
    body = text[: len(text) - len(ending)]
    for i, ch in enumerate(body):
        if ch in _OPEN:
            depth += 1
        elif ch in _CLOSE:
            depth -= 1
            if depth <= 0 and i >= len(opening) and opening in ("(", "[", "\\{"):
                return False
    return True


def _read_matrix(match: re.Match[str], depth: int) -> Matrix:
    body = (match[2] if match[2] is not None else match[3]).replace("\\hline", "").strip()
    lines = [line for line in re.split(r"\\\\(?:\[[^\]]*\])?", body) if line.strip()]
    if len(lines) > 20:
        raise formula.Unreadable
    rows = tuple(tuple(_read(cell, depth + 1) for cell in line.split("&")) for line in lines)
    return Matrix(rows, match[1] in ("v", "V"))


def _choose_signs(text: str, plus: str, minus: str) -> str:
    text = re.sub(r"\\pm(?![A-Za-z])", plus, text)
    return re.sub(r"\\mp(?![A-Za-z])", minus, text)


def _read_inequality(text: str, depth: int) -> Part:
    r"""a \le x < b is [a, b); x > b is (b, \infty)."""
    pieces = _COMPARISON.split(text)
    sides = [side.strip() for side in pieces[::2]]
    signs = [{"<=": "\\le", ">=": "\\ge"}.get(sign, sign) for sign in pieces[1::2]]
    if len(signs) > 2 or not all(sides):
        raise formula.Unreadable
    if all(sign in (">", "\\ge") for sign in signs):
        sides.reverse()
        signs = [{">": "<", "\\ge": "\\le"}[sign] for sign in reversed(signs)]
    is_name = [re.fullmatch(r"\\?[A-Za-z]+(?:\s*\([a-z]\))?", side) is not None for side in sides]
    is_name = [
        n and side not in ("\\infty", "e", "\\pi") for n, side in zip(is_name, sides, strict=True)
    ]
    if signs == ["\\ne"] and is_name == [True, False]:
        hole = _read(sides[1], depth + 1)
        low = Sequence("()", (Number(_negative_infinity(), ""), hole))
        return Items("union", (low, Sequence("()", (hole, Number(_INFINITY, "")))))
    if any(sign not in ("<", "\\le") for sign in signs):
        raise formula.Unreadable
    closed = [sign == "\\le" for sign in signs]
    if is_name == [False, True, False]:
        ends = (_read(sides[0], depth + 1), _read(sides[2], depth + 1))
        return Sequence("(["[closed[0]] + ")]"[closed[1]], ends)
    if is_name == [True, False]:
        low_end = Number(_negative_infinity(), "")
        return Sequence("(" + ")]"[closed[0]], (low_end, _read(sides[1], depth + 1)))
    if is_name == [False, True]:
        return Sequence("(["[closed[0]] + ")", (_read(sides[0], depth + 1), Number(_INFINITY, "")))
    raise formula.Unreadable


def _negative_infinity() -> formula.Node:
    return ("negative", _INFINITY)


def _read_equation(text: str, depth: int) -> Part:
    sides = [side.strip() for side in text.split("=")]
    if len(sides) > 6 or not all(sides):
        raise formula.Unreadable
    left = sides[0]
    name = _NAME.fullmatch(left) is not None or not re.search(r"\d", left)
    if len(sides) > 2 or not name:
        # a chain of equal numbers, such as m+n = 3+4 = 7, is its last one
        chain = [_read_number(side) for side in (sides[1:] if name else sides)]
        if not any(formula.variables(number.node) for number in chain):
            values = {formula.value(number.node, {}) for number in chain}
            if len(values) > 1:
                raise _Contradiction
            return chain[-1]
        if len(sides) > 2:
            raise formula.Unreadable
    right = _read(sides[1], depth + 1)
    if name and not (isinstance(right, Number) and formula.variables(right.node)):
        return right
    if not isinstance(right, Number):
        raise formula.Unreadable
    try:
        node = formula.parse(left)
    except formula.Unreadable:
        if not name:
            raise
        node = ("variable", left)
    return Equation(node, right.node, name, right)


class _Contradiction(formula.Unreadable):
    """An equation of different numbers, such as 42 = 41."""


def _read_base(text: str) -> BasedNumber | None:
    match = _BASE.fullmatch(text)
    if match:
        digits, base = match[2] or match[3], match[4] or match[5]
    elif match := _BASE_WORDS.fullmatch(text):
        digits, base = match[2], match[3]
    else:
        return None
    number = _BASE_NAMES.get(base.lower()) or (int(base) if base.isdigit() and len(base) < 3 else 0)
    if not 2 <= number <= 36 or (not any(ch.isdigit() for ch in digits) and len(digits) < 2):
        return None
    if len(digits) == 1 and digits.isalpha():
        return None  # a variable with an index
    return BasedNumber(match[1] + (digits.upper().lstrip("0") or "0"), number)


def _read_number(text: str) -> Number:
    text, unit = normal_form.strip_unit(text)
    text = text.strip()
    percent = False
    for sign in ("\\%", "%"):
        if text.endswith(sign):
            text, percent = text[: -len(sign)].rstrip(" \\"), True
    if unit == "percent":
        percent = True
    if infinity := _read_infinity(text):
        return Number(infinity, text)
    if _SPACED_NUMBER.fullmatch(text):
        text = text.replace(" ", "")
    if mixed := _MIXED.fullmatch(text):
        text = f"{mixed[1]}\\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    if scale := _SCALE.fullmatch(text):
        text = f"{scale[1]}\\cdot {_SCALES[scale[2].lower()]}"
    if repeating := _REPEATING.fullmatch(text):
        return Number(("number", _repeating(*repeating.groups())), text, None, percent, unit)
    decimal = _DECIMAL.fullmatch(text)
    node = formula.parse(text)
    return Number(node, text, len(decimal[1]) if decimal else None, percent, unit)


def _read_infinity(text: str) -> formula.Node | None:
    bare = text.lstrip("+").replace(" ", "")
    if bare in ("\\infty", "infinity", "inf"):
        return _INFINITY
    if bare in ("-\\infty", "-infinity", "-inf"):
        return _negative_infinity()
    return None


def _repeating(whole: str, fixed: str, repeated: str) -> Fraction:
    sign = -1 if whole.startswith("-") else 1
    first = Fraction(int((whole.strip("+-") or "0") + fixed), 10 ** len(fixed))
    cycle = Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
    return sign * (first + cycle)
