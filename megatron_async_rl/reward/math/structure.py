r"""Splits an answer into its parts: lists, tuples, sets, intervals, matrices and single values.

`read` returns one of the classes of parts.py for an answer in the notation of normal_form.py.
An inequality becomes the interval that it describes (relations.py), 3 \pm 2 a list of two.
"""

from __future__ import annotations

import functools
import re

from megatron_async_rl.reward.math import (
    normal_form,
    numerals,
    phrasing,
    relations,
    words,
)
from megatron_async_rl.reward.math.evaluation import Contradiction, Unreadable
from megatron_async_rl.reward.math.number_equality import components
from megatron_async_rl.reward.math.parts import (
    Congruence,
    Items,
    Matrix,
    Number,
    Part,
    Sequence,
    Words,
    is_interval,
)

_MAX_ITEMS = 60
_MAX_DEPTH = 6
_EMPTY = Words("empty set")
_SPLIT_WORDS = re.compile(r"\s+(?:and|or)\s+|\s*(?:;|\\\\)\s*")
_JOIN = re.compile(r",\s*(?:and|or)\s+")
_BRACKETS = {"\\{": ("\\}",), "(": (")", "]"), "[": (")", "]")}
_MATRIX = re.compile(
    r"(?P<factor>[^&]{0,40}?)(?:"
    r"[\[(]?\s*\\begin\s*\{(?P<kind>[pbvBV]?)matrix\}(?P<a>.*)\\end\s*\{(?P=kind)matrix\}\s*[\])]?|"
    r"[\[(|]?\s*\\begin\s*\{array\}\s*\{[^{}]*\}(?P<b>.*)\\end\s*\{array\}\s*[\])|]?)",
    re.DOTALL,
)
_CASES = re.compile(
    r"(?:[^=\\]{1,20}=)?\s*\\begin\s*\{cases\}(.*)\\end\s*\{cases\}[\s.]*", re.DOTALL
)
_CONDITION_WORDS = re.compile(r"^(?:if|for|when)\b\s*|\bis(?:\s+an?)?\b\s*")
_CONGRUENCE = re.compile(
    r"(?:[^=<>]{1,40}?\\equiv(?![A-Za-z])\s*)?(?P<residue>[^=<>]{1,80}?)\s*"
    r"(?:\\pmod|\\?\(\s*\\?b?mod|\\b?mod|mod|modulo)\s*\{?\s*(?P<modulus>\d{1,12})\s*\}?\s*\)?"
)
_GROUPED = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_TRANSPOSED = re.compile(
    r"(.*[\])])\s*\^\s*\{?\s*(?:T|\\top|\\intercal|\{\s*T\s*\})\s*\}?", re.DOTALL
)
_IN_PARENTHESES = re.compile(r"\([^()]*\)")
_LABEL = re.compile(r"(?:(?<=[\s,;])|^)\((?:i{1,3}|iv|[1-6]|[a-f])\)(?=\s)")
_HOLES = re.compile(r"([A-Za-z])\s*\\ne(?![A-Za-z])\s*(.+)")
_WITHOUT = re.compile(
    r"([(\[][^()\[\]]+[)\]])\s*(?:\\(?:setminus|backslash|smallsetminus)(?![A-Za-z])|-|"
    r"except(?:\s+for)?)\s*(.+)"
)


@functools.lru_cache(maxsize=8192)
def read(text: str) -> Part:
    """Returns the structure of an answer. Raises evaluation.Unreadable or TooLarge."""
    return _read(phrasing.bare(text), depth=0)


def _read(text: str, depth: int) -> Part:
    text = text.strip()
    if depth > _MAX_DEPTH or not text:
        raise Unreadable
    if twelve := numerals.read_twelve(text):
        return twelve
    if found := words.read(text) or numerals.read_date(text) or numerals.read_quantity(text):
        return found
    if text[0] == "(" and len(labelled := _LABEL.split(text)) > 2:  # (i) 3 (ii) 5
        first, *others = (part.strip(" ,;") for part in labelled)
        if not first and all(others):
            return Sequence("()", _read_all(others, depth))
    if "{cases}" in text and (cases := _CASES.fullmatch(text)):
        return _read_cases(cases[1], depth)
    if "\\begin" in text and "=" in text:
        return _read(text.rpartition("=")[2], depth + 1)
    if "\\begin" in text and (matrix := _MATRIX.fullmatch(text)):
        return _read_matrix(matrix, depth)
    if (match := _TRANSPOSED.fullmatch(text) if "^" in text else None) and (
        transposed := _transposed(_read(match[1], depth + 1))
    ):
        return transposed
    if sequence := _read_brackets(text, depth):
        return sequence
    if text == "\\emptyset":
        return _EMPTY
    if "\\mathbb" in text and (numbers := words.read_number_set(text)):
        return numbers
    if "\\cup" in text:
        return Items("union", _read_all(re.split(r"\\cup(?![A-Za-z])", text), depth))
    if "," in text and (without := _WITHOUT.fullmatch(text)):
        whole, removed = _read(without[1], depth + 1), _read(without[2], depth + 1)
        rest = relations.intersection([whole, relations.reals_without(removed)])
        if is_interval(whole) and rest is not None:
            return rest
    if "\\ne" in text and (holes := _HOLES.fullmatch(text)):
        listed = re.sub(rf"\b{holes[1]}\s*\\ne(?![A-Za-z])", "", holes[2])
        if not relations.COMPARISON.search(listed):
            return relations.reals_without(_read(listed, depth + 1))
    if text.count("mod") == 1 and (match := _CONGRUENCE.fullmatch(text)):
        return _read_congruences(match, depth)
    if " and " in text or " or " in text or ";" in text or "\\\\" in text:
        parts = [part for part in _SPLIT_WORDS.split(_JOIN.sub(", ", text)) if part.strip()]
        parts = [piece for part in parts for piece in _split_commas(part)]
        return _list_of(parts, depth, either=" or " in text)
    if based := numerals.read_based(text):
        return based
    if (":" in text or text[-1] in "mM." or " to " in text) and (
        terms := numerals.read_time_or_ratio(text)
    ):
        return terms
    if "," in text and len(parts := _split_commas(text)) > 1:
        return _list_of(parts, depth)
    if "\\pm" in text or "\\mp" in text:
        signs = [_choose_signs(text, "+", "-"), _choose_signs(text, "-", "+")]
        return _flat_list(_read_all(signs, depth))
    if (comparison := relations.COMPARISON.search(text)) and "=" in text:
        comparison = relations.COMPARISON.search(_IN_PARENTHESES.sub("", text))
    if comparison:
        return relations.read_inequality(text, depth, _read)
    if "=" in text:
        if "_" in text and (based := numerals.read_based_chain(text)):
            return based
        return relations.read_equation(text, depth, _read)
    number = numerals.read_number(text)
    return components(number) if "\\vec{j}" in text else number


def _read_all(parts: list[str], depth: int) -> tuple[Part, ...]:
    if not 0 < len(parts) <= _MAX_ITEMS:
        raise Unreadable  # separators alone, such as `\\,`, would equal anything
    return tuple(_read(part, depth + 1) for part in parts)


def _list_of(parts: list[str], depth: int, either: bool = False) -> Items | Part:
    """Returns a list; a union or intersection of inequalities. `either`: joined by `or`."""
    if groups := phrasing.group_by_name(parts):
        return Items("list", tuple(Sequence("()", _read_all(group, depth)) for group in groups))
    items = _read_all(parts, depth)
    is_union = [isinstance(item, Items) and item.kind == "union" for item in items]
    if not all(union or is_interval(item) for union, item in zip(is_union, items, strict=True)):
        return Items("either" if either else "list", _flat_list(items).items)
    if not any(map(relations.COMPARISON.search, parts)):
        return Items("either", items) if either else _flat_list(items)
    if not either and (overlap := relations.intersection(items)):
        return overlap
    flat: list[Part] = []
    for item in items:
        flat += item.items if isinstance(item, Items) else (item,)
    return Items("union", tuple(flat))


def _flat_list(items: tuple[Part, ...]) -> Items:
    flat: list[Part] = []
    for item in items:
        flat += item.items if isinstance(item, Items) and item.kind == "list" else (item,)
    return Items("list", tuple(flat))


def _split_commas(text: str, everywhere: bool = False) -> list[str]:
    """Splits at commas outside of all brackets.

    A comma between thousands separates nothing, unless `everywhere`: (1,234) has two items.
    """
    parts, depth, begin = [], 0, 0
    for i, ch in enumerate(text):
        if ch in normal_form.OPEN:
            depth += 1
        elif ch in normal_form.CLOSE:
            depth -= 1
        elif depth == 0 and (ch == "," or (everywhere and ch == ";")):
            parts.append(text[begin:i].strip())
            begin = i + 1
    parts.append(text[begin:].strip())
    if everywhere:
        return parts
    if len(parts) > 1 and _is_thousands(text):
        return [text]
    return [part for part in parts if part]


def _is_thousands(text: str) -> bool:
    if "/" in text and "," not in _GROUPED.sub("", text):
        return True  # 45/1,024
    return re.match(
        r"(?:[^,=]{1,40}=)?\s*[-+]?\s*\d{1,3}(?:,\d{3})+(?![\d,]|\s*,)", text
    ) is not None and not re.search(r",(?!\d{3}(?!\d))", text)


def _read_brackets(text: str, depth: int) -> Part | None:
    if text[0] == "{":
        return _read_braces(text, depth)
    opening = next((opening for opening in _BRACKETS if text.startswith(opening)), None)
    if opening is None:
        return None
    ending = next((end for end in _BRACKETS[opening] if text.endswith(end)), None)
    if ending is None or not normal_form.closes_at_end(text, opening, ending):
        return None
    inner = text[len(opening) : -len(ending)].strip()
    if opening == "\\{":
        return _read_set(inner, depth)
    parts = _split_commas(inner, everywhere=True)
    if len(parts) == 1:
        if opening == "(" and ending == ")" and "|" not in inner:
            inside = _read(inner, depth + 1)
            return inside if not isinstance(inside, Number) else None
        return None
    if text.count("\\pm") == 1 and opening == "(":
        return _flat_list(_read_all([text.replace("\\pm", sign) for sign in "+-"], depth))
    return Sequence(opening + ending, _read_all(parts, depth))


def _read_set(inner: str, depth: int) -> Part:
    if not inner:
        return _EMPTY
    if builder := relations.SET_BUILDER.fullmatch(inner):
        return _read(builder[1], depth + 1)
    items = _flat_list(_read_all(_split_commas(inner, everywhere=True), depth)).items
    return Words("set of the empty set") if items == (_EMPTY,) else Items("set", items)


def _read_braces(text: str, depth: int) -> Part | None:
    """Reads plain braces: {1, 2} is a set, {x = 1} is x = 1."""
    if not (text.endswith("}") and normal_form.closes_at_end(text, "{", "}")):
        return None
    inner = text[1:-1].strip()
    if len(_split_commas(inner)) > 1 or relations.SET_BUILDER.fullmatch(inner):
        return _read_set(inner, depth)
    return _read(inner, depth + 1)


def _read_congruences(match: re.Match[str], depth: int) -> Part:
    r"""Reads x \equiv 3 \pmod 7; n \equiv 1, 4 \pmod 5 is a list."""
    residue, modulus = _read(match["residue"], depth + 1), int(match["modulus"])
    if not isinstance(residue, Items):
        return Congruence(residue, modulus)
    return Items("list", tuple(Congruence(item, modulus) for item in residue.items))


def _read_matrix(match: re.Match[str], depth: int) -> Matrix:
    body = (match["a"] if match["a"] is not None else match["b"]).replace("\\hline", "").strip()
    lines = [line for line in re.split(r"\\\\(?:\[[^\]]*\])?", body) if line.strip()]
    factor = match["factor"].strip().replace("\\cdot", "")
    if len(lines) > 20:
        raise Unreadable
    rows = [[_read(cell, depth + 1) for cell in line.split("&")] for line in lines]
    if factor:
        rows = [[_multiplied(factor, cell) for cell in row] for row in rows]
    return Matrix(tuple(map(tuple, rows)), match["kind"] in ("v", "V"))


def _read_cases(body: str, depth: int) -> Items:
    """Reads a function by cases: pairs of a value and its condition, as in `x & if x > 0`."""
    pairs: list[Part] = []
    for line in filter(str.strip, body.split("\\\\")):
        before, _, condition = line.partition("&" if "&" in line else ",")
        condition = _CONDITION_WORDS.sub("", condition.strip(" ,.&"))
        condition = "otherwise" if condition == "else" else condition
        pair = _read(before.strip(" ,"), depth + 1), _read(condition, depth + 1)
        pairs.append(Sequence("cases", pair))
    if not pairs:
        raise Contradiction  # no item would be unequal to the expected answer
    return Items("cases", tuple(pairs))


def _transposed(part: Part) -> Part | None:
    """Returns None for a number: (1 + r)^T is a power. A tuple stays: it is a column vector."""
    if isinstance(part, Sequence) and all(isinstance(item, Sequence) for item in part.items):
        part = Matrix(tuple(item.items for item in part.items if isinstance(item, Sequence)), False)
    if isinstance(part, Matrix):
        if len({len(row) for row in part.rows}) != 1:
            raise Unreadable
        return Matrix(tuple(zip(*part.rows, strict=True)), part.is_determinant)
    return part if isinstance(part, Sequence) else None


def _multiplied(factor: str, cell: Part) -> Number:
    number = numerals.read_number("-1" if factor == "-" else factor.strip())
    if not isinstance(cell, Number):
        raise Unreadable
    return Number(("*", number.node, cell.node), "")


def _choose_signs(text: str, plus: str, minus: str) -> str:
    return re.sub(r"\\([pm])[pm](?![A-Za-z])", lambda m: plus if m[1] == "p" else minus, text)
