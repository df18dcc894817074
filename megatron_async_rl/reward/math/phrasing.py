r"""Removes the words around an answer: `the area is`, `x \in`, (approximately), a conclusion.

`bare` takes an answer in the notation of normal_form.py; structure.py reads the rest.
"""

from __future__ import annotations

import re

from megatron_async_rl.reward.math import normal_form, numerals
from megatron_async_rl.reward.math.evaluation import TooLarge, Unreadable, value
from megatron_async_rl.reward.math.parts import Items, Part, Sequence

_OUTWARD = re.compile(r"^([\[\]])([^\[\]()]*[,;][^\[\]()]*)([\[\]])$")  # ]1,2[ is (1,2)
_ELEMENT = re.compile(
    r"^\(?\\?[A-Za-z]+(?:\([a-z]\))?(?:\s*,\s*[A-Za-z])*\)?\s*\\in(?![A-Za-z])\s*"
)
_OF_REALS = re.compile(r"(?:,\s*|\s+for\s+)[A-Za-z]\s*\\in\s*\\mathbb\s*\{?\s*R\s*\}?$")
_OF_INTEGERS = re.compile(  # the end of `x = n\pi, n \in Z`
    r"(?:[,(]\s*\(?\s*(?:where\s+)?|\s+(?:for|where)\s+(?:all\s+|any\s+|some\s+)?(?:integers?\s+)?)([a-z])"
    r"(?:\s*\\in\s*\\mathbb\s*\{?\s*[ZN]\s*\}?(?:[_^]\{?[^{}]{1,9}\}?)?|\s+is\s+(?:an|any)\s+integer|$)\s*\)?"
)
# the end of `cx for all real c`, which restricts nothing
_FOR_ALL = re.compile(
    r"\s*,?\s*\(?(?:for|where)\s+(?:(?:all|any|every|each|some)\s+)(?:(?:real|positive|natural|complex|arbitrary)\s+)?"
    r"(?:(?:constants?|numbers?|values?\s+of)\s+)?[A-Za-z](?:\s*\\in\s*\\mathbb\s*\{?\s*[RNCQ]\s*\}?)?\s*\)?$|"
    r"\s*,?\s*\(?where\s+[A-Za-z]\s+is\s+(?:a|an|any)\s+(?:real\s+|arbitrary\s+)*(?:constant|number)\)?$"
)
_CHOOSE = re.compile(  # _5C_2, ^5C_2
    r"(?:\{\s*\})?[_^]\s*\{?(\w+)\}?\s*C\s*_\s*\{?(\w+)\}?"
)
_CHOOSE_FROM = re.compile(r"(?<![A-Za-z\\])C\s*\(\s*(\w+)\s*,\s*(\w+)\s*\)")  # C(5, 2)
_CHOOSE_AFTER = re.compile(r"(?<![A-Za-z\\])C\s*_\s*\{?(\d+)\}?\s*\^\s*\{?(\d+)\}?")  # C_5^2
_MAPPING = re.compile(r"^[A-Za-z]\s*\\mapsto\s*")
_FUNCTION = re.compile(
    r"(?<![A-Za-z\\])([fghpFGHP])(?:\^\{-1\})?\s*\(\s*[a-z]\s*\)\s*(?:=|\\equiv(?![A-Za-z])(?!.*mod))"
)
_HOLE = re.compile(
    r"(?!.*\\(?:[lg]e|in)(?![A-Za-z]))([^=<>,]*[a-z][^=<>,]*),\s*(?:where\s+|for\s+)?\(?[a-z]\s*\\ne(?![A-Za-z])[^=<>,]*"
)
_CONSTANT = re.compile(r"(?<![A-Za-z\\])C(?![A-DF-Za-df-z])")  # C or Ce^x, of integration
_SMALL_CONSTANT = re.compile(r"(?<![A-Za-z\\])c(?![A-DF-Za-df-z])|(?<=\+)\s*[Kk]$")
_CHAIN = re.compile(
    r"(?<![A-Za-z\\=])([a-z](?:\s*=\s*[a-z])+)\s*=\s*((?:\\[A-Za-z]+|[^=,;A-Za-z])+)(?=,|;|$|\s+(?:and|or)\b)"
)
_ARGUMENT = re.compile(r"(?:[fghpFGHP]\s*\(|[A-Za-z]_\{?)\s*([a-z])\s*[)}]?\s*=")
_OF_VARIABLES = re.compile(r"^([A-Za-z])\s*\(\s*[a-z](?:\s*,\s*[a-z])*\s*\)\s*=")  # u(x, t) =
_DERIVATIVE = re.compile(r"^\\frac\s*\{\s*d([a-z])\s*\}\s*\{\s*d[a-z]\s*\}\s*=")
_SET_NAME = re.compile(  # A \cup B =
    r"^[A-Z\s(]*(?:\\(?:cup|cap|complement)(?![A-Za-z])[A-Z\s()_{}]*)+=\s*(?=\\?[{(\[\\])"
)
_VALUE_OF = re.compile(r"^[a-z]\s*=")
_INTEGER_NAME = re.compile(r"(?<![A-Za-z\\])[klmn](?![A-Za-z])")
_NEGATIVE = re.compile(r"^(?:negative|minus)\s+(?=[\d\\]|inf)", re.IGNORECASE)
_REALS = re.compile(
    r"\\mathbb\s*\{?\s*R\s*\}?|(?i:(?:the\s+set\s+of\s+)?(?:all|any)\s+reals?(?:\s+numbers?)?)|"
    r"\(?-\\infty\s*<\s*[a-z]\s*<\s*\\infty\)?"
)
_POSITIVE_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?\s*[\^_]\s*\{?\s*(?:\+|>\s*0)\s*\}?")
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|sim)(?![A-Za-z])")
_APPROXIMATED = re.compile(r"(?<=[\d})])\s*\\(?:approx|simeq|sim)(?![A-Za-z])\s*-?\d+(?:\.\d+)?")
_BARE_NAME = re.compile(r"\s*\\?[A-Za-z]*\s*")
_LEAD = re.compile(
    r"^(?:[A-Za-z]+\s+){0,4}?(?:the\s+)?(?:final\s+)?(?:answer|area|length|value|volume|sum|total|result|probability|price|"
    r"cost|number|perimeter)(?:\s+is|\s*[=:])\s*(?:equal to\s+)?",
    re.IGNORECASE,
)
_COMMENT = re.compile(
    r"(?<=[\d}%\])c])\s+\(\s*(?=[^()]*[A-Za-z]{4})(?!(?:wrong|incorrect|when|at\s+(?:most|least))\b)"
    r"[A-Za-z][A-Za-z'-]*(?:[\s,.]+[A-Za-z'-]+){0,8}\.?\s*\)$"
)
# `the total number of ways is 25`, `the point (1, 2)`, `all x such that x > 3`
_SENTENCE = re.compile(
    r"(?:[A-Za-z][A-Za-z'-]+,?\s+){0,8}(?:is|are|equals|there\s+are|there\s+is)\s+(?:equal\s+to\s+)?"
    r"(?=[-+\d\\(\[{.<a-z])|"
    r"(?:the\s+)?(?:ordered\s+)?(?:interval|center|point|points|line|vector|pair|triple|value|number|integer|"
    r"domain|range|solution|solutions|set|equation|plane|curve)s?\s*:?\s+(?=[-+\d\\(\[{.])|"
    r"(?:all\s+)?(?:real\s+)?(?:(?:numbers?|values?)\s+)?(?:of\s+)?[a-z]?\s*such\s+that\s+|"
    r"(?:in\s+)?(?:the\s+)?year\s+(?=\d)|in\s+(?=\d{4}$)|"
    r"all\s+(?:(?:positive\s+)?integers\s+|natural\s+numbers\s+)?(?=[a-z]\s*(?:[<>]|\\[lg]e))|"
    r"all\s+(?:real\s+)?(?:numbers|values)\s+(?:of\s+[a-z]\s+)?(?:with\s+)?(?=[-+\d\\(.]|[a-z]\s*[<>\\])",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b(?:not|no|never|neither|nor|if|unless|without|least|most)\b", re.IGNORECASE
)
_ALTERNATIVE = re.compile(r"\s*\(\s*or\s+([^()]+)\)$")  # 3/4 (or 0.75)
_FRACTION = r"-?(?:\d+/\d+|\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})"
_BOTH_FORMS = re.compile(  # 0.75 (3/4)
    rf"(-?\d*\.\d+)\s+\(\s*=?\s*({_FRACTION})\s*\)|({_FRACTION})\s+\(\s*=?\s*(-?\d*\.\d+)\s*\)"
)
_NAMED_PART = re.compile(r"\s*([A-Za-z])\s*=\s*([^=]+)")
_NAMED = re.compile(r"(?:^|,|;|\band\b|\})\s*(?:m?\s*\\angle\s*)?([A-Za-z]{1,3})\s*=")
_NAMED_TUPLE = re.compile(r"\(\s*([A-Za-z](?:\s*,\s*[A-Za-z])+)\s*\)\s*=\s*\([^=]*$")
_ROUNDED = re.compile(  # (approximately 3.61), after an exact value
    r"(?<=[\w})])\s*,?\s*\(?\s*(?:or\s+)?(?:approximately|approx\.?|about|roughly|"
    r"\\approx(?![A-Za-z]))\s*\$?(-?\d[\d,]*\.\d+)\s*(?:\\?%)?[\s)]*$"
)
_EXACT = re.compile(r"\\(?:frac|sqrt|pi|ln|log|binom)|/")
_PLURAL = re.compile(r"(?<=[a-z])\(s\)")
_PART_OF = re.compile(r"(\d[\d,]*)\s+(?:out\s+of|in|over)\s+(\d[\d,]*)")
_ANGLES = re.compile(r"<([^<>=]*,[^<>=]*)>")
_UNION_LETTER = re.compile(r"(?<=[)\]])\s*U\s*(?=[(\[])")
_POINT = re.compile(r"[A-Z]'?\s*(?=\([^()]*,[^()]*\)$)")  # A(1, 2)
# the answer is the text after a conclusion
_CONCLUSION = re.compile(
    r"^(?:=|\\(?:equiv|to|rightarrow)(?![A-Za-z]))|"
    r"^.*\\(?:Rightarrow|implies|Longrightarrow|therefore|iff|Leftrightarrow)(?![A-Za-z])",
    re.DOTALL,
)
_CJK_LEAD = re.compile(  # of an answer such as `there are 42`, but not of `minus 42` and the like
    "(?!\\D*[\u8d1f\u975e\u4e0d\u5c11\u591a\u5c0f\u5927\u81f3\u8d85\u767e\u5343\u4e07\u5341\u5206\u500d\u7b2c])"
    "[\u4e00-\u9fff]{1,12}[:,]?\\s*(?=[-+.\\d\\\\(])"
)
_END_OF_WORD = re.compile(r"(?<=[A-Za-z]{3})\.$")
_DIGIT_GROUPS = re.compile(r"(?<=\d)[_'](?=\d{3}(?!\d))")


def bare(text: str) -> str:
    """Returns the answer without phrases, comments and names. Raises Unreadable if it is too long
    or nothing is left."""
    text = _CONCLUSION.sub("", normal_form.unwrap_text(text)).strip(' "').removesuffix(" .")
    text = _END_OF_WORD.sub("", text)
    if not 0 < len(text) <= normal_form.MAX_CHARS:
        raise Unreadable
    if not text[0].isascii():
        text = text[match.end() :] if (match := _CJK_LEAD.match(text)) else text
    if text[0].isalpha():
        text = _POINT.sub("", _LEAD.sub("", text, count=1), count=1)
        text = _NEGATIVE.sub("-", numerals.spell_out(text))
        if (sentence := _SENTENCE.match(text)) and not _DENIAL.search(sentence[0]):
            text = text[sentence.end() :].removesuffix(".")
        if "y" not in text:
            text = _MAPPING.sub("y=", text)
            if len(set(_FUNCTION.findall(text))) == 1:
                text = _FUNCTION.sub("y=", text)
        text = _OF_VARIABLES.sub(r"\1=", text)
    if text.startswith("\\frac"):
        text = _DERIVATIVE.sub(r"\1'=", text)
    if "\\c" in text:
        text = _SET_NAME.sub("", text)
    if "U" in text:
        text = _UNION_LETTER.sub(r"\\cup ", text)
    if "C" in text:
        text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
        text = _CHOOSE_AFTER.sub(r"\\binom{\1}{\2}", text)
    if "mathbb" in text or "integer" in text:
        text = _name_integer(text)
    if "for " in text or "where " in text:
        text = _FOR_ALL.sub("", text)
    if "\\in" in text:
        text = _ELEMENT.sub("", _OF_REALS.sub("", text))
    if text.endswith(")"):
        text = _ALTERNATIVE.sub(r" or \1", _PLURAL.sub("s", _COMMENT.sub("", text)))
        if both := _BOTH_FORMS.fullmatch(text):
            text = " or ".join(filter(None, both.groups()))
    if (rounded := _ROUNDED.search(text)) and _is_rounding(text[: rounded.start()], rounded[1]):
        text = text[: rounded.start()]
    if part := _PART_OF.fullmatch(text):
        text = f"{part[1]}/{part[2]}"
    if "_" in text or "'" in text:
        text = _DIGIT_GROUPS.sub("", text)
    if "\\" in text:
        text = _exact_side(text)
    text = _REALS.sub(r"(-\\infty,\\infty)", _POSITIVE_REALS.sub(r"(0,\\infty)", text))
    if angles := _ANGLES.fullmatch(text):
        text = f"({angles[1]})"
    if "]" in text or "[" in text:
        text = "\\cup".join(_OUTWARD.sub(_inward, part.strip()) for part in text.split("\\cup"))
    return text.strip()


def aligned(expected: str, answer: str) -> tuple[str, str]:
    r"""Aligns both answers if only one of them has a statement about its variables.

    These are `k \in \mathbb{Z}`, `x \ne 3` after a fraction, and the argument of `f(t) = 2t`.
    """
    if max(len(expected), len(answer)) > normal_form.MAX_CHARS:
        return expected, answer
    if "C" in answer and "," not in expected:  # it is no point
        answer = _CHOOSE_FROM.sub(r"\\binom{\1}{\2}", answer)
    if "\\mathbb" in expected or "\\mathbb" in answer:
        expected, answer = _share_condition(expected, answer)
    if ("\\ne" in expected) != ("\\ne" in answer):
        expected, answer = (
            match[1] if (match := _HOLE.fullmatch(text)) and "\\ne" not in match[1] else text
            for text in (expected, answer)
        )
    if _CONSTANT.search(expected) and not _CONSTANT.search(answer):
        answer = _SMALL_CONSTANT.sub("C", answer)
    own, other = _ARGUMENT.match(expected), _ARGUMENT.match(answer)
    if own and other and own[1] != other[1] and not _letter(own[1]).search(answer):
        answer = _letter(other[1]).sub(own[1], answer)
    return expected, answer


def _share_condition(expected: str, answer: str) -> tuple[str, str]:
    texts = [normal_form.unwrap_text(expected), normal_form.unwrap_text(answer)]
    has_condition = ["in" in text and _OF_INTEGERS.search(text) is not None for text in texts]
    if has_condition[0] == has_condition[1]:
        return expected, answer
    index = has_condition.index(False)
    names = set(_INTEGER_NAME.findall(_VALUE_OF.sub("", texts[index])))
    if len(names) == 1:
        texts[index] += f", {names.pop()} \\in \\mathbb{{Z}}"
    return texts[0], texts[1]


def needs_expansion(expected: str, gold: Part, answer: str, given: Part) -> bool:
    """Returns whether x = y = 0 is to be compared with a tuple, a list or another chain."""
    chains = [_CHAIN.search(text) is not None for text in (expected, answer)]
    several = [isinstance(part, Sequence | Items) for part in (gold, given)]
    return all(chains) or (chains[0] and several[1]) or (chains[1] and several[0])


def expand_chains(text: str) -> str:
    """Returns `x = 0, y = 0, z = 5` for `x = y = 0, z = 5`."""
    return _CHAIN.sub(
        lambda m: ", ".join(f"{name.strip()} = {m[2].strip()}" for name in m[1].split("=")), text
    )


def _letter(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z\\]){name}(?![A-Za-z])")


def _name_integer(text: str) -> str:
    """Returns an answer for all integers with n as their name, without the condition."""
    match = _OF_INTEGERS.search(text)
    if match is None or text[match.end() :].strip(" .") or "in" not in match[0]:
        return text
    rest, name = _VALUE_OF.sub("", text[: match.start()]), match[1]
    if name != "n" and _letter("n").search(rest):
        return rest
    return _letter(name).sub("n", rest)


def _is_rounding(exact: str, rounded: str) -> bool:
    """True for a formula that has the value of the decimal after it, to its places."""
    if not _EXACT.search(exact):
        return False
    try:
        number = complex(value(numerals.read_number(exact.strip(" $")).node, {}))
    except (Unreadable, TooLarge, ArithmeticError):
        return False
    places = len(rounded.partition(".")[2])
    return abs(number - float(rounded.replace(",", ""))) <= 10.0**-places


def _inward(match: re.Match[str]) -> str:
    return f"{'[('[match[1] == ']']}{match[2]}{'])'[match[3] == '[']}"


def _exact_side(text: str) -> str:
    if "approx" in text or "sim" in text:  # the exact value comes first
        text = _APPROXIMATED.sub("", text)
        sides = _APPROXIMATELY.split(text)
        text = next((side for side in sides if not _BARE_NAME.fullmatch(side)), text)
    return text.replace("\\langle", "(").replace("\\rangle", ")")


def named_values(text: str) -> list[str]:
    """Returns the names of AB = 9, CD = 4 or (m, n) = (4, 6).

    Equal names are none: x = 1, x = 2 and x_1 = 1, x_2 = 2 are lists.
    """
    if named := _NAMED_TUPLE.match(text):
        return [name.strip() for name in named[1].split(",")]
    names = _NAMED.findall(text)
    return names if len(names) > 1 and len(set(names)) == len(names) == text.count("=") else []


def group_by_name(parts: list[str]) -> list[list[str]]:
    """Returns the values of x = 1, y = 2, x = 3, y = 4 as [1, 2], [3, 4], by name; else []."""
    named = [match for part in parts if (match := _NAMED_PART.fullmatch(part))]
    size = len({match[1] for match in named})
    if len(named) < len(parts) or not 1 < size < len(parts) or len(parts) % size:
        return []
    groups = [sorted(named[i : i + size], key=lambda m: m[1]) for i in range(0, len(parts), size)]
    if any(len({match[1] for match in group}) < size for group in groups):
        return []
    return [[match[2] for match in group] for group in groups]
