r"""Rewrites an answer in one notation: unicode as LaTeX, one command for each meaning, no layout.

The result is still LaTeX, so that math-verify can read it: `√2` and \sqrt2, `30°` and 30\degree,
\bigl( and \left( become the same. `unwrap_text` goes further, for the project's own comparison.
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
_DEGREE = re.compile(
    r"\s*\^\s*\{?\s*\^\\circ\s*\}?|"  # ^\degree
    r"\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})\s*\.?|"
    r"(?<=\d)\s*\^\s*(?:o(?![A-Za-z])|(?:\\text)?\{\s*o\s*\})"
)
_PHANTOM = re.compile(
    r"\\(?:[hv]?(?:phantom|space|skip|mskip)|tag|label)\*?\s*(?:\{[^{}]*\}|[^\s{\\])"
)
_INVISIBLE = re.compile(
    r"\\(?:[hv]?phantom|[hv]space|[hvm]skip|mskip|tag|label|left\s*\.|right\s*\.|square|Box|textsuper)"
)
_NO_DELIMITER = re.compile(r"\\(?:left|right)\s*\.(?!\d)|\s*\\(?:square|Box)\s*$")
_QUANTITY = re.compile(r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}")  # of siunitx
_SIMPLE_QUANTITY = re.compile(r"\\(num|ang)\s*\{([^{}]*)\}")
_BARE_FONT = re.compile(r"\\(?:mathrm|text|textbf)\s+(?=[A-Za-z\d](?![A-Za-z]))")  # \mathrm e
_OPERATOR = re.compile(r"\\operatorname\*?\s*\{\s*(\w+)\s*\}")
_COLOR = re.compile(r"\\(?:text)?color(?:box)?\s*(?:\[\w*\])?\s*\{[\w!]*\}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{(?:aligned|align|gathered|split|equation)\*?\}|&")
_OUTER = re.compile(
    r"\s*\\begin\s*\{(aligned|align\*?|equation\*?|gathered|gather\*?)\}(?P<body>.*)"
    r"\\end\s*\{\1\}\s*",
    re.DOTALL,
)
_ONE_CELL = re.compile(r"\s*\\begin\s*\{array\}\s*\{[^{}]*\}(?P<body>[^&]*)\\end\s*\{array\}\s*")
_UNIT_LETTER = r"\s*(?:\\([ij])math|([ijk]))\s*"
_ARROW = r"\\(?:mathbf|boldsymbol|bm|hat|widehat|vec|overrightarrow)\s*"
_UNIT_VECTOR = re.compile(  # \mathbf{i}, \hat{\jmath}, \hat{\mathbf{k}}
    rf"{_ARROW}(?:\{{\s*{_ARROW}\{{{_UNIT_LETTER}\}}\s*\}}|\{{{_UNIT_LETTER}\}}|{_UNIT_LETTER}(?![A-Za-z]))"
)
_CASES = re.compile(r"\\begin\s*\{cases\}(.*?)\\end\s*\{cases\}", re.DOTALL)
_INFIX = re.compile(r"\{([^{}]*)\\(over|choose)(?![A-Za-z])([^{}]*)\}")
_INFIX_COMMANDS = {"over": "frac", "choose": "binom"}
_SLASHED = re.compile(r"\^\{?(\d+)\}?\s*/\s*_\{?(\d+)\}?")  # ^3/_7
_PYTHON_POWER = re.compile(r"(?<=[\w)])\*\*(?=[\w({-])")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_CIRCLED = re.compile("([\u2460-\u2473])(?=[\u2460-\u2473])")  # items of a list, not digits
_RAISED_FRACTION = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹]+)[\u2044/]([₀₁₂₃₄₅₆₇₈₉]+)")
_THOUSANDS = re.compile(
    r"\\(?:text|mathpunct|mathord)\s*\{,\}(?=\d{3}(?!\d))|,\s*\\!\s*(?=\d{3}(?!\d))|\{,\}(?=\d{3}(?!\d))|(?<=\d)\\[,;:!](?=\d{3}(?!\d))"
)
_NEEDS_WORK = re.compile(r"[\\~`{^\x80-\U0010ffff]|\*\*|degree|\+/-")
_FOREIGN_DOLLARS = re.compile(r"(?:\bUS|\bCA?|\bAU?|\bNZ|\bHK|\bS)\\?\$(?=\s*[\d.])")
_ELLIPSIS = re.compile(r"(?<=\.\d)(\d*)\.{3,}$")

_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up|sc)?|mathrm|mathbf|mathop|mbox|hbox|operatorname|ensuremath|"
    r"emph|underline)\*?\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
)
_WRAPPER = re.compile(  # around a formula that has braces of its own
    r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mbox|hbox|underline|mathop|emph)\s*\{(?=[^{}]*\{)"
)
_UNIT_FRACTION = re.compile(
    r"\\frac\s*\{\s*\\(?:text|mathrm)\{\s*([a-z]+)\s*\}\s*\}\s*"
    r"\{\s*\\(?:text|mathrm)\{\s*([a-z]+)\s*\}(?:\^\{?\d\}?)?\s*\}$"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_ENDS = " \t\n,;:"
OPEN, CLOSE = "([{", ")]}"
_MARKS = ("__", "*", "_", '"', "'")
_MAX_REWRITTEN_CHARS = 2_000
MAX_CHARS = 600  # longer answers are left to math-verify


def normalize(text: str) -> str:
    """Returns the answer in one notation, without delimiters, currency marks and layout."""
    text = text.strip()
    if text.isdecimal() and text.isascii():
        return text
    if len(text) > _MAX_REWRITTEN_CHARS:
        return text
    if "$" in text:
        text = _FOREIGN_DOLLARS.sub("", text)
    if _NEEDS_WORK.search(text) is not None:
        text = _rewrite(text).rstrip("\\")
    text = _strip_ends(text.replace("$", ""))
    if text and not text[0].isalnum():
        for mark in _MARKS:
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = _strip_ends(text[len(mark) : -len(mark)])
    return text


def _strip_ends(text: str) -> str:
    text = text.strip(_ENDS)
    if text.endswith("..."):
        text = _ELLIPSIS.sub(r"\1\\ldots", text)
    return text.rstrip(".")


def _rewrite(text: str) -> str:
    text = text.removeprefix("\\#")
    if "**" in text:
        text = _PYTHON_POWER.sub("^", text)
    if not text.isascii():
        text = _CIRCLED.sub(r"\1, ", text)
        text = _RAISED_FRACTION.sub(
            lambda m: f"\\frac{{{m[1].translate(_SUPERSCRIPTS)}}}{{{m[2].translate(_SUBSCRIPTS)}}}",
            text,
        )
        text = _RAISED.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
        text = _LOWERED.sub(lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    if "," in text or "\\" in text:
        text = _THOUSANDS.sub("", text)
    text = (
        text.replace("\\text{:}", ":")
        .replace("{:}", ":")
        .replace("\\text{-}", "-")
        .replace("{-}", "-")
    )
    if "^" in text:
        text = _TIMES_TEN.sub("\\\\cdot ", _SLASHED.sub(r"\\frac{\1}{\2}", text))
    if "\\" in text:
        text = _rewrite_layout(text)
    if "``" in text:
        text = text.replace("``", '"').replace("''", '"')
    text = text.replace("\\not=", "\\ne ").replace("\\not =", "\\ne ")
    text = _TOKEN.sub(_token, text).replace("+/-", "\\pm ")
    if "circ" in text or "o" in text:
        text = _DEGREE.sub(r"^\\circ ", text)
    return text.strip()


def _rewrite_layout(text: str) -> str:
    """Removes invisible parts, colors and environments; writes \\over and \\choose as usual."""
    if _INVISIBLE.search(text):
        text = _PHANTOM.sub(" ", text)
        text = _NO_DELIMITER.sub("", text).replace("\\textsuperscript", "^")
    if "\\SI" in text or "\\qty" in text:
        text = _QUANTITY.sub(lambda m: f"{m[1]}\\text{{ {m[2].replace(chr(92), ' ')}}}", text)
    if "\\num" in text or "\\ang" in text:
        text = _SIMPLE_QUANTITY.sub(lambda m: m[2] + "^\\circ " * (m[1] == "ang"), text)
    text = _BARE_FONT.sub("", text)
    if "\\operatorname" in text:
        text = _OPERATOR.sub(
            lambda m: f"\\{m[1]}" if f"\\{m[1]}" in symbols.COMMANDS else m[0], text
        )
    if "j" in text:
        for _ in range(2):  # of \hat{\mathbf j} the inner one first
            text = _UNIT_VECTOR.sub(lambda m: f"\\vec{{{''.join(filter(None, m.groups()))}}}", text)
    if "color" in text:
        text = _COLOR.sub("", text)
    if "\\over" in text or "\\choose" in text:
        text = _INFIX.sub(lambda m: f"\\{_INFIX_COMMANDS[m[2]]}{{{m[1]}}}{{{m[3]}}}", text)
    if "\\begin" in text:
        text = text.replace("smallmatrix", "matrix")
        if outer := _OUTER.fullmatch(text) or _ONE_CELL.fullmatch(text):
            text = outer["body"] if "\\\\" not in outer["body"] or "matrix" in text else text
        if "matrix" not in text and "array" not in text:
            text = _CASES.sub(_join_cases, text)
            if "{cases}" not in text:
                text = _ENVIRONMENT.sub("", text)
    return text


def _join_cases(match: re.Match[str]) -> str:
    """Returns the equations of a system as a list; a function by cases stays as it is."""
    lines = match[1].replace("&=", "=").replace("=&", "=").split("\\\\")
    is_system = not any("&" in line for line in lines) and all("=" in line for line in lines)
    return ", ".join(lines) if is_system else match[0]


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
    wrapper = _WRAPPER.match(text) if text[-1] == "}" else None
    if wrapper and closes_at_end(text, wrapper[0], "}"):
        text = text[wrapper.end() : -1]
    for _ in range(4):
        text, count = _TEXT.subn(r" \1 ", text)
        if not count:
            break
    return " ".join(text.split()).replace(" ,", ",")


def closes_at_end(text: str, opening: str, ending: str) -> bool:
    """Returns whether the bracket that ends `opening` is closed by `ending`, the text's end."""
    depth = 0
    for i, ch in enumerate(text[: len(text) - len(ending)]):
        if ch in OPEN:
            depth += 1
        elif ch in CLOSE:
            depth -= 1
            if depth <= 0 and i >= len(opening):
                return False
    return True


def is_cut_off(text: str) -> bool:
    """True for an open brace, and for an operator at the end."""
    if text.endswith(("+", "-", "*", "/", "=", "^", "_", "\\cdot")):
        return True
    depth = 0
    for match in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth < 0:
            return True
    return depth != 0
