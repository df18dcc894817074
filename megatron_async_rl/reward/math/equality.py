"""Decides whether two answers are equal, without sympy and in bounded time.

None means that this module cannot decide: one of the answers has a part that it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from megatron_async_rl.reward.math import (
    normal_form,
    number_equality,
    numerals,
    phrasing,
    relations,
    structure,
    words,
)
from megatron_async_rl.reward.math.evaluation import (
    Contradiction,
    TooLarge,
    Unreadable,
    value,
    variables,
)
from megatron_async_rl.reward.math.parts import (
    INFINITY,
    BasedNumber,
    Clock,
    Congruence,
    Equation,
    Items,
    Matrix,
    Number,
    Part,
    Ratio,
    Sequence,
    Words,
    as_matrix,
    is_infinite,
)

_HEDGE = re.compile(r"\b(?:or|either|maybe|perhaps|possibly)\b|\?", re.IGNORECASE)
_PROSE_WORD = re.compile(r"(?<![\\A-Za-z])(?!sin|cos|tan|log|exp|sqrt|arc|text)[A-Za-z]{3,}")
_AND_WORD = re.compile(r"\band\b")


def equal(expected: str, answer: str) -> bool | None:
    """Returns whether two normalized answers are equal, None where math-verify has to decide."""
    if (chosen := words.equal_choices(expected, answer)) is not None:
        return chosen
    expected, answer = phrasing.aligned(expected, answer)
    try:
        gold = structure.read(expected)
    except (Unreadable, TooLarge, ArithmeticError, RecursionError):
        equal_texts = _equal_texts(expected, answer)
        return bool(equal_texts) if "{cases}" in expected else equal_texts
    try:
        given = structure.read(answer)
        if phrasing.needs_expansion(expected, gold, answer, given):  # a = b = 1 is (1, 1)
            expected, answer = map(phrasing.expand_chains, (expected, answer))
            gold, given = structure.read(expected), structure.read(answer)
    except Contradiction:
        return False
    except (Unreadable, TooLarge, ArithmeticError, RecursionError):
        # words never equal an unreadable answer
        is_open = "\\ldots" in answer and "\\ldots" not in expected
        is_open = is_open or normal_form.is_cut_off(answer) or _HEDGE.search(answer) is not None
        # of prose, math-verify would take some number
        is_open = is_open or len(_PROSE_WORD.findall(answer)) > 2 or "{cases}" in expected
        return False if is_open or isinstance(gold, Words) else None
    if relations.names_other(expected, answer):
        return False
    own_names, other_names = phrasing.named_values(expected), phrasing.named_values(answer)
    if own_names and other_names and set(own_names) != set(other_names):
        return False
    if own_names or other_names:
        gold, given = relations.in_order(gold, given, own_names, other_names)
    try:
        if isinstance(given, Equation) and relations.is_line(expected, gold, given):
            return True
        if isinstance(given, Items) and _AND_WORD.search(answer) and _is_mixed_number(given, gold):
            return True
        return _equal(gold, given)
    except TooLarge:
        return False if _only_one_is_huge(gold, given) else None
    except (Unreadable, ArithmeticError):
        return _equal_texts(expected, answer)


def _only_one_is_huge(gold: Part, given: Part) -> bool:
    if not (isinstance(gold, Number) and isinstance(given, Number)):
        return False
    return number_equality.is_huge(gold.node) != number_equality.is_huge(given.node)


def _equal_texts(expected: str, answer: str) -> bool | None:
    squeezed = [
        re.sub(r"[\s{}]", "", normal_form.unwrap_text(text)).casefold()
        for text in (expected, answer)
    ]
    return True if squeezed[0] == squeezed[1] else None


def _equal(gold: Part, given: Part) -> bool | None:
    if isinstance(gold, Number) and isinstance(given, Number):
        return number_equality.equal_numbers(gold, given)
    if isinstance(gold, Items) or isinstance(given, Items):
        return _equal_items(gold, given)
    if isinstance(gold, BasedNumber) or isinstance(given, BasedNumber):
        return _equal_based(gold, given)
    if isinstance(gold, Congruence) or isinstance(given, Congruence):
        return _equal_congruences(gold, given)
    if isinstance(gold, Equation) or isinstance(given, Equation):
        return _equal_equations(gold, given)
    if isinstance(gold, Matrix) or isinstance(given, Matrix):
        return _equal_matrices(gold, given)
    if isinstance(gold, Ratio) or isinstance(given, Ratio):
        return _equal_ratios(gold, given)
    if isinstance(given, Clock) and isinstance(gold, Number) and "\\frac" in gold.text[:6]:
        return _equal_ratios(gold, given)  # 17:50 for 17/50
    if isinstance(gold, Sequence) and isinstance(given, Sequence):
        if gold.brackets != given.brackets:
            return False
        return _equal_all(gold.items, given.items)
    if isinstance(gold, Clock) and isinstance(given, Clock):
        return gold.is_same_time(given)
    text, other = (gold, given) if isinstance(gold, Words) else (given, gold)
    if not isinstance(text, Words):
        return False
    if isinstance(other, Number):
        if text.text == "infinitely many":
            return other.node == INFINITY
        return numerals.is_quantity(text, number_equality.rational(other), other.unit)
    if not isinstance(other, Words):
        return False
    return text.text in (other.text, other.verdict) or text.verdict == other.text


def _equal_all(left: tuple[Part, ...], right: tuple[Part, ...]) -> bool | None:
    """Compares items in their order."""
    if len(left) != len(right):
        return False
    return _all(_equal(a, b) for a, b in zip(left, right, strict=True))


def _all(results: Iterable[bool | None]) -> bool | None:
    unknown = False
    for result in results:
        if result is False:
            return False
        unknown = unknown or result is None
    return None if unknown else True


def _equal_items(gold: Part, given: Part) -> bool | None:
    """Compares lists, sets and unions in any order; their kinds may differ, except unions."""
    if isinstance(gold, Items) and isinstance(given, Items):
        kinds = {gold.kind, given.kind}
        if "union" in kinds and kinds & {"list", "set"}:
            return False
        return _match_all(gold.items, given.items)
    items, other = (gold, given) if isinstance(gold, Items) else (given, gold)
    assert isinstance(items, Items)
    if items.kind == "chain" and isinstance(last := items.items[-1], Equation):
        return items is given and _equal(gold, last.right_part)
    if items is given and all(_equal(other, item) for item in items.items):
        return True  # one value in several forms
    if isinstance(other, Matrix) and all(len(row) == 1 for row in other.rows):
        other = Sequence("()", tuple(row[0] for row in other.rows))
    if items.kind == "list" and isinstance(other, Sequence):
        return _equal_bare_tuple(items, other)
    if len(items.items) == 1:
        return _equal(items.items[0], other) if items is gold else _equal(other, items.items[0])
    if items is gold and items.kind == "list" and isinstance(other, Words | Clock):
        return None
    return False


def _is_mixed_number(items: Items, gold: Part) -> bool:
    """True for 2 and 1/2, of 5/2."""
    if len(items.items) != 2:
        return False
    whole, part = map(number_equality.rational, items.items)
    if whole is None or part is None or whole.denominator != 1 or not whole or not 0 < part < 1:
        return False
    return number_equality.rational(gold) == (whole + part if whole > 0 else whole - part)


def _equal_bare_tuple(items: Items, other: Sequence) -> bool | None:
    """Compares a tuple without its brackets, in the same order; an interval needs them."""
    is_array = other.brackets == "[]" and len(other.items) > 2
    if other.is_range or (other.brackets != "()" and not is_array):
        return False
    if any(isinstance(item, Number) and is_infinite(item) for item in other.items):
        return False
    return _equal_all(items.items, other.items)


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
        return value(gold.node, {}) == int(given.digits, given.base)
    except (ValueError, KeyError):
        return False


def _equal_congruences(gold: Part, given: Part) -> bool | None:
    if isinstance(gold, Congruence) and isinstance(given, Congruence):
        if gold.modulus != given.modulus:
            return False
        a, b = (number_equality.rational(one.residue) for one in (gold, given))
        if a is None or b is None:
            return _equal(gold.residue, given.residue)
        return (a - b) % gold.modulus == 0
    one, other = (gold, given) if isinstance(gold, Congruence) else (given, gold)
    assert isinstance(one, Congruence)
    if isinstance(other, Equation) and other.name:
        other = other.right_part
    if isinstance(other, Number) and variables(other.node):
        residue = number_equality.rational(one.residue)
        return number_equality.is_residue_class(other.node, residue, one.modulus)
    return _equal(gold.residue if one is gold else gold, given.residue if one is given else given)


def _equal_equations(gold: Part, given: Part) -> bool | None:
    if isinstance(gold, Equation) and isinstance(given, Equation):
        if gold.name and given.name and gold.left == given.left:
            return _equal(gold.right_part, given.right_part)
        differences = [("-", one.left, one.right) for one in (gold, given)]
        return number_equality.proportional(*differences)
    equation, other = (gold, given) if isinstance(gold, Equation) else (given, gold)
    assert isinstance(equation, Equation)
    if not isinstance(other, Number):
        return False
    # a + b = 7 says 7, but 7 does not say a + b = 7
    is_value = equation.name or (equation is given and not variables(equation.right))
    if not is_value and equation is given:  # (x+1)^2 = x^2+2x+1 is a chain
        right = equation.right_part
        is_value = isinstance(right, Number) and number_equality.equal_numbers(
            Number(equation.left, ""), right
        )
    return is_value and _equal(equation.right_part, other)


def _equal_matrices(gold: Part, given: Part) -> bool | None:
    if isinstance(gold, Number) or isinstance(given, Number):
        return None  # may be a determinant
    left, right = as_matrix(gold), as_matrix(given)
    if left is None or right is None or left.is_determinant != right.is_determinant:
        return False
    if [len(row) for row in left.rows] != [len(row) for row in right.rows]:
        return False
    return _all(_equal_all(a, b) for a, b in zip(left.rows, right.rows, strict=True))


def _equal_ratios(gold: Part, given: Part) -> bool | None:
    """3:4 is 6:8 and 3/4."""
    terms = []
    for part in (gold, given):
        if isinstance(part, Ratio):
            terms.append([term.node for term in part.terms])
        elif isinstance(part, Clock) and not part.half:  # 9:12
            terms.append([("number", Fraction(number)) for number in part.numbers])
        elif isinstance(part, Number) and not is_infinite(part):
            terms.append([part.node, ("number", Fraction(1))])
        else:
            return False
    return number_equality.same_ratio(*terms)
