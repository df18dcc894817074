"""Splits a unit, a currency or a degree sign from the number before it."""

from __future__ import annotations

import re

_UNITS = frozenset(
    "cm mm km nm dm m kg g mg lb lbs oz ft yd in inch inches feet foot mi mph kph ml mL l L h hr "
    "hrs min mins sec secs s ms Hz kHz MHz GHz rad deg sq cu pm cc ha pt qt gal J kJ N W V A C F K "
    "Pa kPa mA mV kV kW MW GW kWh dB eV mol M KB MB GB TB cents cent US USD EUR GBP INR CAD AUD "
    "NZD CHF JPY CNY HKD SGD RMB Rs dollars euros pounds units unit percent pts AU st nd rd "
    "th".split()
)
NOT_UNITS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh cis ln log lg exp sqrt cbrt pi "
    "lim max min gcd lcm mod and or not infinity inf squared cubed factorial half halves third "
    "thirds fourth fourths fifth fifths quarter quarters base hundred thousand million billion "
    "trillion dozen if for when where but except unless plus minus times am is are over divided "
    "choose none neither either maybe no to hundreds thousands millions billions dozens tenth "
    "tenths hundredth hundredths thousandth thousandths sixth sixths seventh sevenths eighth "
    "eighths ninth ninths twelfth twelfths tens than below mil crore lakh one two three four five "
    "six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety".split()
)
_UNIT_PART = r"(?:[A-Za-z]+\.?(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?)"
_UNIT = re.compile(
    rf"(?<=[\d)}}%\]a-z])(?P<gap>[\s-]*(?:/\s*(?=[A-Za-z]{{3}}))?)(?P<unit>(?<![A-Za-z\\]){_UNIT_PART}"
    rf"(?:(?:\s*(?:/|\\cdot|\*)\s*|\s+){_UNIT_PART}){{0,5}})\s*$"
)
_UNIT_SYMBOL = re.compile(r"(?<=[\d}])\s*\\(?:Omega|mu\s*[A-Za-z]{1,3}|AA)$")
_ANGLE_FUNCTION = re.compile(r"sin|cos|tan|cot|sec|csc|cis")
_ORDINAL = re.compile(r"(?<=\d)\s*\^\s*\{?\s*(?:st|nd|rd|th)\s*\}?$")
_BRACED = re.compile(r"(?<=\d)\s*\{\s*([A-Za-z]+)\s*\}$")  # of 90{\rm cm}
# words of Chinese, Japanese and Korean, but for powers of ten
_CJK_UNIT = re.compile(
    "(?<=\\d)\\s*(?![万萬亿億兆千百十])[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]{1,6}$"
)
_UNIT_WORD = re.compile(r"[A-Za-z]+")
_VOWEL = re.compile(r"[aeiou]", re.IGNORECASE)
_LEADING = re.compile(
    r"(?:USD|EUR|GBP|INR|CAD|AUD|NZD|CHF|JPY|CNY|HKD|SGD|RMB|Rs\.?|US|(?:about|exactly|around|"
    r"approximately|nearly|only|just)\s)\s*(?=[-+.\d\\])",
    re.IGNORECASE,
)
_MAX_CHARS = 120  # of a unit


def strip_unit(text: str) -> tuple[str, str]:
    """Returns (answer, unit): `25 cm^2` is ("25", "cm^2"), a formula without unit is (text, "").

    Words of three letters and more are units, shorter ones if they are known, single letters only
    after a space: `8x` and `8 ab` have no unit.
    """
    if text[:1].isalpha():
        text = _LEADING.sub("", text, count=1)
    if text.endswith("}"):
        text = _BRACED.sub(r" \1", text)
    if not text.isascii() and (unit := _CJK_UNIT.search(text)):
        return text[: unit.start()], unit[0].strip()
    if "^" in text and (ordinal := _ORDINAL.search(text)):
        return text[: ordinal.start()], ""
    if text.endswith("^\\circ") and not _ANGLE_FUNCTION.search(text):
        return text[: -len("^\\circ")].rstrip(), "degrees"
    if not text[-1:].isalnum() and text[-1:] not in ".}":
        return text, ""
    end = text[-_MAX_CHARS:]
    if "\\" in end and (symbol := _UNIT_SYMBOL.search(end)):
        return text[: len(text) - len(end) + symbol.start()], symbol[0].strip()
    match = _UNIT.search(end)
    if match is None:
        return text, ""
    core = text[: len(text) - len(end) + match.start()].rstrip(" -")
    if core.endswith(("\\cdot", "\\div", "*", "/", "+", "^")):
        return text, ""
    has_digit = any(ch.isdigit() for ch in core) or "\\pi" in core
    for number, word in enumerate(_UNIT_WORD.findall(match["unit"])):
        if number and word in ("squared", "cubed"):
            continue
        if word.lower() in NOT_UNITS and word != "min":
            return text, ""
        known = word in _UNITS
        spaced = bool(match["gap"]) or number > 0
        if len(word) == 1 and not (known and spaced):
            return text, ""
        if len(word) == 2 and not known and word != "of":
            return text, ""
        is_product = not spaced and list(word) == sorted(word)  # 2abc
        if not known and (not has_digit or is_product or not _VOWEL.search(word)):
            return text, ""
    return core, match["unit"]
