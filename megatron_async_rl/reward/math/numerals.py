r"""Reads the notations of single values: numbers, bases, times, dates, ratios, congruences.

`read_number` reads all that formula.py can and more: 2 1/2, 0.\overline{3}, 5 million, 25 cm.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_async_rl.reward.math import formula, units
from megatron_async_rl.reward.math.evaluation import Contradiction, Unreadable
from megatron_async_rl.reward.math.parts import (
    INFINITY,
    NEGATIVE_INFINITY,
    BasedNumber,
    Clock,
    Number,
    Ratio,
    Words,
)

_BASE = re.compile(
    r"(-?)(?:[(\[{]\s*([0-9A-Za-z]+)\s*[)\]}]|\\overline\s*\{([0-9A-Za-z]+)\}|([0-9A-Fa-f]+|[0-9A-Z]+))"
    r"\s*_\s*(?:\{\s*\(?\s*(?:base\s+)?(\w+)\s*\)?\s*\}|(\d+|[a-z]{3,6}))"
)
_BASE_WORDS = re.compile(r"(-?)([0-9A-F]+)\s*\(?\s*(?:in\s+)?base\s*[-_]?\s*(\w+)\s*\)?", re.I)
_BASE_PREFIX = re.compile(r"(-?)0([bxo])([0-9A-F]+)", re.IGNORECASE)
_PREFIX_BASES = {"b": 2, "o": 8, "x": 16}
_BASE_NAMES = {
    name: base
    for base, name in enumerate(
        "two three four five six seven eight nine ten eleven twelve".split(), start=2
    )
}
_CLOCK = re.compile(
    r"(\d+(?:\s*:\s*\d+)+)\s*(?:([ap])\.?\s*m\.?)?|(\d+)\s*([ap])(?:\.\s*m|m)\b\.?", re.IGNORECASE
)
_HALF_OF_DAY = re.compile(r"in the (?:(morning)|afternoon|evening)$")
_TWELVE = re.compile(r"(?:12(?::00)?\s+)?(noon|midnight)", re.IGNORECASE)
_TIME = re.compile(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?")
_RATIO_WORDS = re.compile(r"\d+(?:\.\d+)?(?:\s+to\s+\d+(?:\.\d+)?)+")
_MONTHS = "january february march april may june july august september october november december"
_MONTH_NUMBERS = {name: number for number, name in enumerate(_MONTHS.split(), start=1)}
MONTHS = frozenset(_MONTH_NUMBERS)
_MONTH_NUMBERS |= {name[:3]: number for name, number in _MONTH_NUMBERS.items()} | {"sept": 9}
_MONTH = rf"(?P<month>{'|'.join(sorted(_MONTH_NUMBERS, key=len, reverse=True))})\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?:,?\s+(?P<year>\d{4}))?"
_DATES = [
    re.compile(rf"(?:[a-z]{{3,6}}day,?\s+)?{form}", re.IGNORECASE)
    for form in (
        rf"{_MONTH}\s+(?:the\s+)?{_DAY}{_YEAR}",
        rf"(?:the\s+)?{_DAY}\s+(?:of\s+)?{_MONTH}{_YEAR}",
        r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)",
        r"(?P<month>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4})",
    )
]
_QUANTITY_UNITS = {  # of quantities in two units, such as 5 feet 3 inches
    "hour": "h hr hrs hour hours",
    "minute": "m min mins minute minutes",
    "second": "s sec secs second seconds",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "foot": "ft foot feet",
    "inch": "in inch inches",
    "pound": "lb lbs pound pounds",
    "ounce": "oz ounce ounces",
    "dollar": "dollar dollars",
    "cent": "cent cents",
}
_UNIT_NAMES = {name: unit for unit, names in _QUANTITY_UNITS.items() for name in names.split()}
_QUANTITY = re.compile(r"(\d+)\s*([a-z]+)\.?,?\s*(?:and\s+)?(\d+)\s*([a-z]+)\.?", re.IGNORECASE)
_SMALLER_UNITS = {
    ("week", "day"): 7,
    ("day", "hour"): 24,
    ("hour", "minute"): 60,
    ("minute", "second"): 60,
    ("year", "month"): 12,
    ("foot", "inch"): 12,
    ("pound", "ounce"): 16,
}
_REMAINDER = re.compile(r"(\d+)\s*,?\s+(?:R|r|remainder)\.?\s*(\d+)")  # 3 R 2
_ANGLE = re.compile(r"(\d{1,9})\s*\^\\circ\s*(\d{1,2})\s*'")
_INFINITE = re.compile(r"([-+]?)\s*(?:\\infty|infinity|inf)")
_DECIMAL = re.compile(r"[-+]?\s*(?:\d[\d,]*)?\.(\d+)")
_MIXED = re.compile(r"(?<![\d./}])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
_REPEATING = re.compile(
    r"(?P<whole>[-+]?\d*)\.(?P<fixed>\d*)(?:"
    r"\\(?:overline|bar|dot)\s*(?:\{(?P<a>\d+)\}|(?P<b>\d))|\((?P<c>\d+)\)|"
    r"(?P<d>\\dot\s*\{?\d\}?\d*\\dot\s*\{?\d\}?))(?:\\ldots)?"
)
_ELLIPSIS = re.compile(r"([-+]?\d*)\.(\d+)\s*\\ldots")
_SPACED_NUMBER = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])")
_SCALE = re.compile(
    r"([-+]?[\d.,]*\d)\s*(hundred|thousand|million|billion|trillion|dozen)\b"
    r"(?:\s+(?!percent)([a-z]{3,}))?",
    re.I,
)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SCALES |= {"trillion": 10**12, "dozen": 12}


_CARDINALS = {
    name: number
    for number, name in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
}
_PARTS = {
    f"{name}{plural}": number
    for number, name in enumerate("third fourth fifth sixth seventh eighth ninth tenth".split(), 3)
    for plural in ("", "s")
} | {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}
_TENS = dict(
    zip("thirty forty fifty sixty seventy eighty ninety".split(), range(30, 100, 10), strict=True)
)
_CARDINALS |= _TENS | {
    f"{ten}-{one}": number + _CARDINALS[one]
    for ten, number in (_TENS | {"twenty": 20}).items()
    for one in "one two three four five six seven eight nine".split()
}
_SPELLED = re.compile(
    r"((?:negative|minus) )?([a-z]+)(?:([ -])([a-z]+)( [a-z ]+)?)?", re.IGNORECASE
)


def spell_out(text: str) -> str:
    """Returns the digits of a number in words, such as seven, three-fourths or nine apples."""
    match = _SPELLED.fullmatch(text)
    if match is None or (number := _CARDINALS.get(match[2].lower())) is None:
        return text
    sign, second, rest = match[1] or "", (match[4] or "").lower(), match[5] or ""
    if number_of_both := _CARDINALS.get(f"{match[2].lower()}-{second}"):
        return f"{sign}{number_of_both}{rest}"
    if second in _PARTS:
        return f"{sign}{number}/{_PARTS[second]}{rest}"
    return text if match[3] == "-" else f"{sign}{number} {second}{rest}".strip()


def read_based(text: str) -> BasedNumber | None:
    r"""Reads 52_8, (52)_{\text{eight}}, 52 base 8 and 0b101."""
    if match := _BASE.fullmatch(text):
        digits, base = match[2] or match[3] or match[4], match[5] or match[6]
    elif match := _BASE_WORDS.fullmatch(text):
        digits, base = match[2], match[3]
    elif match := _BASE_PREFIX.fullmatch(text):
        digits, base = match[3], str(_PREFIX_BASES[match[2].lower()])
    else:
        return None
    number = _BASE_NAMES.get(base.lower()) or (int(base) if base.isdigit() and len(base) < 3 else 0)
    if not 2 <= number <= 36 or (not any(ch.isdigit() for ch in digits) and len(digits) < 2):
        return None
    if len(digits) == 1 and digits.isalpha():
        return None  # a variable with an index
    return BasedNumber(match[1] + (digits.upper().lstrip("0") or "0"), number)


def read_based_chain(text: str) -> BasedNumber | None:
    """Reads 52_8 = 42_{10}: the number in its last base other than ten. Raises Contradiction."""
    sides = [side.strip() for side in text.split("=")]
    numbers = [BasedNumber(side, 10) if side.isdecimal() else read_based(side) for side in sides]
    based = [number for number in numbers if number is not None]
    if len(based) < len(sides):
        return None
    try:
        values = {int(number.digits, number.base) for number in based}
    except ValueError:
        return None
    if len(values) > 1:
        raise Contradiction
    return next((one for one in reversed(based) if one.base != 10), based[0])


def read_twelve(text: str) -> Clock | None:
    """Reads noon, 12 noon and midnight."""
    match = _TWELVE.fullmatch(text)
    return match and Clock(("12", "00"), "p" if match[1].lower() == "noon" else "a")


def read_time_or_ratio(text: str) -> Clock | Ratio | None:
    """Reads 10:30 a.m., 3 pm, 3:4, 3 to 4 and x:2x."""
    text = _HALF_OF_DAY.sub(lambda match: "am" if match[1] else "pm", text)
    clock = _CLOCK.fullmatch(text)
    half = "" if clock is None else (clock[2] or clock[4] or "").lower()
    if clock and (half or _TIME.fullmatch(text)):
        hours, *rest = (part.strip() for part in (clock[1] or clock[3]).split(":"))
        return Clock((hours.lstrip("0") or "0", *(rest or ["00"])), half)
    if _RATIO_WORDS.fullmatch(text):
        text = re.sub(r"\s+to\s+", ":", text)
    terms = text.split(":")
    if not 2 <= len(terms) <= 5 or "=" in text:
        return None
    return Ratio(tuple(read_number(term.strip()) for term in terms))


def read_date(text: str) -> Words | None:
    """Reads May 3, 3rd of May, 2024-05-03 and 5/3/2024."""
    for form in _DATES:
        if match := form.fullmatch(text):
            month = _MONTH_NUMBERS.get(match["month"].lower()) or int(match["month"])
            return Words(f"date {match['year'] or ''} {month} {int(match['day'])}")
    return None


def read_quantity(text: str) -> Words | Number | None:
    """Reads a quantity in two units: 5 feet 3 inches, 3 dollars and 54 cents, 45 degrees 30'."""
    if "'" in text and (angle := _ANGLE.fullmatch(text)):
        return Number(("number", int(angle[1]) + Fraction(int(angle[2]), 60)), text)
    if division := _REMAINDER.fullmatch(text):
        return Words(f"{division[1]} remainder {division[2]}")
    if (match := _QUANTITY.fullmatch(text)) is None:
        return None
    large, small = (_UNIT_NAMES.get(match[i].lower()) for i in (2, 4))
    if not large or not small:
        return None
    if (large, small) == ("dollar", "cent") and len(match[3]) < 3:
        return read_number(f"{match[1]}.{match[3]:0>2}")
    values: tuple[tuple[str, Fraction], ...] = ()
    if factor := _SMALLER_UNITS.get((large, small)):
        total = int(match[1]) * factor + int(match[3])
        values = (large, Fraction(total, factor)), (small, Fraction(total))
    return Words(f"{match[1]} {large} {match[3]} {small}", values=values)


def is_quantity(words: Words, number: Fraction | None, unit: str) -> bool:
    """Returns whether 3 hours 30 minutes is a number, in its unit if it has one."""
    own = [_UNIT_NAMES.get(word) for word in re.findall("[a-z]+", unit.lower())]
    return any(number == total and (not own or name in own) for name, total in words.values)


def read_number(text: str) -> Number:
    """Raises Unreadable and TooLarge."""
    text, unit = units.strip_unit(text)
    text = text.strip()
    percent = unit == "percent"
    for sign in ("\\%", "%"):
        if text.endswith(sign):
            text, percent = text[: -len(sign)].rstrip(" \\"), True
    if not text:
        raise Unreadable
    if infinity := _INFINITE.fullmatch(text):
        return Number(NEGATIVE_INFINITY if infinity[1] == "-" else INFINITY, text)
    if " " in text:
        text = _SPACED_NUMBER.sub(lambda match: match[0].replace(" ", ""), text)
    if "/" in text:
        text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    if (scale := _SCALE.fullmatch(text)) and (scale[3] or "").lower() not in units.NOT_UNITS:
        text = f"{scale[1]}\\cdot {_SCALES[scale[2].lower()]}"
    if "\\" in text or "(" in text:
        if match := _REPEATING.fullmatch(text):
            return Number(("number", _read_repeating(match)), text, None, percent, unit)
        if match := _ELLIPSIS.fullmatch(text):
            if (repeated := _repeated_end(match[2])) is not None:
                number = _repeating(match[1], match[2][: -2 * len(repeated)], repeated)
                return Number(("number", number), text, None, percent, unit)
            text = f"{match[1]}.{match[2]}"
    decimal = _DECIMAL.fullmatch(text)
    return Number(formula.parse(text), text, len(decimal[1]) if decimal else None, percent, unit)


def _read_repeating(match: re.Match[str]) -> Fraction:
    repeated = match["a"] or match["b"] or match["c"] or re.sub(r"\D", "", match["d"])
    return _repeating(match["whole"], match["fixed"], repeated)


def _repeated_end(digits: str) -> str | None:
    """Returns the digits that repeat at the end of 0.1666..., None if none are seen to repeat."""
    for size in range(1, len(digits) // 2 + 1):
        cycle = digits[-size:]
        if digits.endswith(cycle * (3 if size == 1 and len(digits) > 4 else 2)):
            return cycle
    return None


def _repeating(whole: str, fixed: str, repeated: str) -> Fraction:
    sign = -1 if whole.startswith("-") else 1
    first = Fraction(int((whole.strip("+-") or "0") + fixed), 10 ** len(fixed))
    cycle = Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
    return sign * (first + cycle)
