r"""Rewrites an answer in one notation: unicode as LaTeX, one command for each meaning, no layout.

The result is still LaTeX, so that math-verify can read it: `√2` and \sqrt2, `30°` and 30\degree,
\bigl( and \left( become the same. `unwrap_text` and `strip_unit` go further, for the project's own
comparison.
"""

from __future__ import annotations

import re
import unicodedata

from megatron_async_rl.reward.math import symbols

_TOKEN = re.compile(r"\\(?:[A-Za-z]+|.|\n)|\*\*|[~`]|[^\x00-\x7f]", re.DOTALL)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ⁽⁾", "0123456789+-ni()")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ⁽⁾]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+")
_ROOT = re.compile(r"√\s*(?:(\d+(?:\.\d+)?|[A-Za-zπ])|(?=[({\\]))")
_DEGREE = re.compile(r"\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})\s*\.?")
_DEGREE_WORD = re.compile(r"(?<=[\d})])\s*(?:\\text\s*\{\s*)?degrees?\b(?:\s*\})?")
_PHANTOM = re.compile(r"\\[hv]?(?:phantom|space|skip|mskip)\*?\s*(?:\{[^{}]*\}|[^\s{\\])")
_PYTHON_POWER = re.compile(r"(?<=[\w)])\*\*(?=[\w({-])")
_THOUSANDS = re.compile(r",\s*\\!\s*(?=\d{3})|\{,\}(?=\d{3})|(?<=\d)\\[,;:!](?=\d{3}(?!\d))")
_NEEDS_WORK = re.compile(r"[\\~`{^\x80-\U0010ffff]|\*\*|degree")

_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up|sc)?|mathrm|mathbf|mbox|hbox|operatorname|textcolor)\*?"
    r"\s*\{([^{}]*)\}"
)
_UNIT_FRACTION = re.compile(
    r"\\frac\s*\{\s*\\(?:text|mathrm)\{\s*([a-z]+)\s*\}\s*\}\s*"
    r"\{\s*\\(?:text|mathrm)\{\s*([a-z]+)\s*\}(?:\^\{?\d\}?)?\s*\}$"
)
_ENDS = " \t\n,;:"
_MAX_REWRITTEN_CHARS = 2_000
MAX_CHARS = 600  # longer answers are left to math-verify


def normalize(text: str) -> str:
    """Returns the answer in one notation, without delimiters, currency marks and layout."""
    text = text.strip()
    if len(text) > _MAX_REWRITTEN_CHARS:
        return text
    if _NEEDS_WORK.search(text) is not None:
        text = _rewrite(text)
    text = text.replace("$", "").strip(_ENDS).rstrip(".")
    for mark in ("__", "*", "_"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            text = text[len(mark) : -len(mark)].strip(_ENDS).rstrip(".")
    return text


def _rewrite(text: str) -> str:
    if "**" in text:
        text = _PYTHON_POWER.sub("^", text)
    if not text.isascii():
        text = _ROOT.sub(lambda m: f"\\sqrt{{{m[1]}}}" if m[1] else "\\sqrt", text)
        text = _RAISED.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
        text = _LOWERED.sub(lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    if "," in text or "\\" in text:
        text = _THOUSANDS.sub("", text)
    if "phantom" in text or "space" in text or "skip" in text:
        text = _PHANTOM.sub(" ", text)
    text = _TOKEN.sub(_token, text)
    if "circ" in text:
        text = _DEGREE.sub(r"^\\circ ", text)
    if "degree" in text:
        text = _DEGREE_WORD.sub(r"^\\circ ", text)
    return text


def _token(match: re.Match[str]) -> str:
    token = match[0]
    known = symbols.COMMANDS.get(token)
    if known is not None:
        return known
    if token.isascii():
        return token
    known = symbols.SYMBOLS.get(token)
    if known is not None:
        return known
    plain = unicodedata.normalize("NFKC", token)
    numerator, slash, denominator = plain.partition("\u2044")
    if slash:  # a fraction in one character, such as ½
        return f"\\frac{{{numerator}}}{{{denominator}}}"
    return plain


def unwrap_text(text: str) -> str:
    r"""Returns the answer with the words of \text{...} and its kin as plain words."""
    if "\\" not in text:
        return " ".join(text.split())
    text = _UNIT_FRACTION.sub(r" \1/\2", text)
    for _ in range(4):
        text, count = _TEXT.subn(r" \1 ", text)
        if not count:
            break
    return " ".join(text.split())


_UNITS = frozenset(
    "cm mm km nm dm m kg g mg lb lbs oz ft yd in inch inches feet foot mi mph kph ml mL l L h hr "
    "hrs min mins sec secs s Hz kHz rad deg sq cu pm J N W V A C F K Pa kPa kW kWh cents cent USD "
    "EUR GBP INR Rs dollars euros pounds units unit percent pts AU".split()
)
_NOT_UNITS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp sqrt pi lim max min "
    "gcd lcm mod and or not infinity inf squared cubed factorial half halves third thirds fourth "
    "fourths fifth fifths quarter quarters base hundred thousand million billion trillion dozen if "
    "for when where but except unless plus minus times am is are over divided choose none neither "
    "either maybe no".split()
)
_UNIT_PART = r"(?:[A-Za-z]+\.?(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?)"
_UNIT = re.compile(
    rf"(?<=[\d)}}%\]a-z])(?P<gap>[\s-]*)(?P<unit>(?<![A-Za-z\\]){_UNIT_PART}"
    rf"(?:(?:\s*(?:/|\\cdot|\*)\s*|\s+){_UNIT_PART}){{0,5}})\s*$"
)
_UNIT_WORD = re.compile(r"[A-Za-z]+")
_LEADING = re.compile(
    r"(?:USD|EUR|GBP|INR|Rs\.?|US|(?:about|exactly|approximately)\s)\s*(?=[-+.\d\\])", re.I
)


def strip_unit(text: str) -> tuple[str, str]:
    """Returns (answer, unit): `25 cm^2` is ("25", "cm^2"), a formula without unit is (text, "").

    Words of two letters and more are units, single letters only if they are known ones after a
    space: `8x` has no unit.
    """
    text = _LEADING.sub("", text, count=1)
    if text.endswith("^\\circ"):
        return text[: -len("^\\circ")].rstrip(), "degrees"
    if not text[-1:].isalnum() and text[-1:] not in ".}":
        return text, ""
    match = _UNIT.search(text[-120:])
    if match is None:
        return text, ""
    cut = len(text) - len(text[-120:])
    core = text[: cut + match.start()].rstrip(" -")
    words = _UNIT_WORD.findall(match["unit"])
    has_digit = any(ch.isdigit() for ch in core) or "\\pi" in core
    for number, word in enumerate(words):
        if word in _NOT_UNITS and word not in ("min", "sec"):
            return text, ""
        known = word in _UNITS
        spaced = bool(match["gap"]) or number > 0
        if len(word) == 1 and not (known and spaced):
            return text, ""
        if len(word) == 2 and not known and not spaced:
            return text, ""
        if not has_digit and not known:
            return text, ""
    return core, match["unit"]
