r"""Finds the formula, number or words of an answer that is not boxed (final_answer.py).

`first` reads the answer that a statement such as `the answer is` names, `last` the end of a text
without a statement. A formula counts as a whole; formulas joined by `and`, `or` or a comma are one
answer.
"""

from __future__ import annotations

import re

from megatron_async_rl.reward.math.numerals import MONTHS

# words before a number or name that the question gave: `divisors of 196`, `when $x > 0$`
_CONTEXT = re.compile(
    r"\b(?:of\s+the|of\s+all|than|divided\s+by|divisible\s+by|out\s+of|modulo|factor\s+of|factors\s+of|"
    r"divisors\s+of|divisor\s+of|multiple\s+of|multiples\s+of)\s*$",
    re.IGNORECASE,
)
_CONDITION = re.compile(r"\b(?:of|for|by|when|if|where|since|because|for\s+all|whenever)\s*$", re.I)
_CONDITIONAL = re.compile(r"\\?[A-Za-z]+(?:\([a-z]\))?(?:\s*(?:[<>]|\\[lg]eq?|\\ne).*)?")
_OPEN_FENCE = re.compile(r"\s*```\w*\n\s*")
# a dollar sign before a digit is money if the next one ends no formula: in $5 + $3 = $8
_DELIMITED = re.compile(
    r"\$\$(?P<a>[^$]+)\$\$|(?<!\\)\$(?!\d[^$\n]{0,200}[\s+*/=\u2212-]\$)(?P<b>(?:[^$\\\n]|\\.)+)(?<!\\)\$(?!\d)"
    r"|\\\((?P<c>.+?)\\\)"
    r"|\\\[(?P<d>.+?)\\\]|\\begin\{(?P<env>equation|align|gather)\*?\}(?P<e>.+?)\\end\{(?P=env)\*?\}",
    re.DOTALL,
)
_BOLD = re.compile(r"(\*\*|__)(?!\s)(.+?)(?<!\s)\1")
_ADVERB = re.compile(
    r"^(?:just|simply|exactly|then|therefore|thus|only|equal\s+to|equals|given\s+by|precisely|indeed|"
    r"also|now|clearly|found\s+to\s+be)[\s:,]+",
    re.IGNORECASE,
)
_NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?")
_BARE_NAME = re.compile(r"\\?[a-z]+(?:_\{?\w+\}?)?|(?:\\(?:triangle|angle)\s*)?[A-Z]{2,4}")
# explanations of an answer, as in `42, which is even` and `42 (since 6 * 7 = 42)`
_EXPLANATION = re.compile(
    r",?\s+\(?(?:which|because|since|as|so|i\.e\.|that\s+is|not|see)\b.*",
    re.DOTALL,
)
# a dot that ends a sentence: not in 3.5, not in `a.m.` or `\ldots`
_SENTENCE_END = re.compile(
    r"(?<![ap]\.m)(?<!\b[A-Za-z])\.(?=\s+[A-Z\\$(]|\s*$)|\n\s*\n|[!?](?=\s+(?!Or\b)[A-Z])"
)
_JOINED = re.compile(
    r"(?=\s*[,;a-z])[\s,;]*(?:\b(?:and|or|maybe|perhaps|possibly|either)\b[\s,;]*)*", re.I
)
# a command with its text, or a word
_WORD = re.compile(
    r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{[^{}]*\}|(?<![\\A-Za-z])[A-Za-z][A-Za-z'\u2019-]*|"
    r"(?!(?<=\d)[\u4e07\u842c\u4ebf\u5104\u5146\u5343\u767e\u5341])[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]+"
)
_OUT_OF = re.compile(r"(\d+)\s+out\s+of\s+(\d+)")
# before a number that is denied or only a bound
_DENIED = re.compile(
    r"\b(?:not|never|cannot\s+be|can't\s+be|isn't|whether\s+it\s+is)\s*$|"
    r"\b(?:more|less|greater|fewer|smaller|larger)\s+than\s*$|"
    "(?:\u4e0d\u662f|\u4e0d\u4e3a|\u4e0d\u7b49\u4e8e|\u5e76\u975e)\\s*$",  # Chinese: is not
    re.IGNORECASE,
)
_PART = re.compile(
    r"(\d[\d,.]*)\s+of\s+(?:the|these|those|his|her|their|its|all|every)\s+\d[\d,.]*"
)
# the result of a calculation, with its unit: the 26 of `13 * 2 = 26 inches in 13 years`
_RESULT = re.compile(
    r"=\s*\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?=\s+(?:in|for|at|on|a|per|by|of|to|each)\b|"
    r"\s+(?!and\b|but\b|hundred|thousand|million|billion|trillion|dozen|squared|cubed|percent|sqrt)[a-z]{3})"
)
_FURTHER = re.compile(
    r"[,;=]|\.\s|\b(?:so|thus|therefore|hence|or|but|leaving|which|means|is|are|was|were)\b"
)
_CHOICE_LINE = re.compile(
    r"(?:[(\[]([A-J])[)\]]|([A-HJ]))\.?|([A-HJ])[.)]\s+\S.{0,60}"
)  # I is a word
_JOINING = frozenset(("and", "or", "maybe", "perhaps", "possibly"))
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc ln log exp sqrt pi lim max min gcd lcm mod infinity inf".split()
)
_UNIT_WORDS = frozenset(
    "cm mm km m kg g mg ft in inches inch feet mi mph ml L l h hr hrs min sec s degrees percent "
    "cents dollars and or am pm".split()
)
_LEADING = " \t\n,;:*_"  # no dot: .5 is an answer
_TRAILING = f"{_LEADING}."


def first(text: str) -> str:
    """Returns the formula, number or words that a statement such as `the answer is` names."""
    text = _OPEN_FENCE.sub("", _ADVERB.sub("", text), count=1)
    match = _DELIMITED.search(text)
    if match and not re.search(r"[\dA-Za-z]", text[: match.start()]):
        return _join_spans(text, match)
    bold = _BOLD.match(text.lstrip(" :\n"))
    if bold:
        return unwrap(bold[2])
    sentence = _SENTENCE_END.split(text.strip(), 1)[0]
    sentence = sentence.strip().split("\n", 1)[0]
    if not text.lstrip().startswith(f"{sentence}."):
        sentence = sentence.rstrip("!")  # 42! is a factorial within a sentence only
    return unwrap(_EXPLANATION.sub("", sentence))


def _join_spans(text: str, match: re.Match[str]) -> str:
    """Returns a delimited formula, with those joined to it by `and`, `or` or a comma."""
    parts = [_inner(match)]
    while True:
        rest = text[match.end() :]
        following = _DELIMITED.search(rest)
        if following is None or not _JOINED.fullmatch(rest[: following.start()][:40]):
            break
        parts.append(_inner(following))
        text, match = rest, following
    after = text[match.end() :]
    if len(parts) == 1:
        unit = re.match(r"(?:\\?%|\s*(?:degrees|percent)\b|\s*\u00b0)", after)
        if unit:
            return f"{parts[0]} {unit[0]}"
        either = re.match(r"\s*,?\s*(?:or|and)\s+(?:maybe\s+)?([-+]?[\d.]*\d(?:\s*\\?%)?)", after)
        if either:
            parts.append(either[1])
    return ", ".join(parts)


def _inner(match: re.Match[str]) -> str:
    text = next(match[name] for name in "abcde" if match[name] is not None)
    if match["e"] is not None or "{aligned}" in text:  # the last line of a derivation
        text = re.sub(r"\\(?:begin|end)\{aligned\}", "", text)
        if "matrix" in text:
            text = text.rpartition("=")[2]
        else:
            lines = [line for line in text.replace("&", "").split("\\\\") if line.strip()]
            text = lines[-1].lstrip(" \n=") if lines else ""
    return text.lstrip(_LEADING).rstrip(_TRAILING)


def has_sentences(text: str) -> bool:
    return _SENTENCE_END.search(text) is not None


def unwrap(text: str) -> str:
    """Removes the delimiters or the bold marks around an answer."""
    text = text.lstrip(_LEADING).rstrip(_TRAILING)
    match = _DELIMITED.search(text)
    if match and not text[: match.start()].strip(_TRAILING):
        rest = text[match.end() :]
        if not re.search(r"[\d\\]", rest) or _JOINED.match(rest):
            return _join_spans(text, match)
    bold = _BOLD.fullmatch(text)
    return bold[2] if bold else text


def last(text: str) -> str:
    """Returns the last formula or number of the text, as a whole."""
    spans = list(_DELIMITED.finditer(text))
    last = spans[-1] if spans else None
    tail = text if last is None else text[last.end() :]
    before, _, line = tail.strip().rpartition("\n")
    is_listed = _CHOICE_LINE.fullmatch(before.rpartition("\n")[2])  # as one of several options
    if (choice := _CHOICE_LINE.fullmatch(line)) and not (choice[3] and is_listed):
        return choice[1] or choice[2] or choice[3]
    bold = list(_BOLD.finditer(tail))
    if bold and not tail[bold[-1].end() :].strip(_TRAILING):
        return unwrap(bold[-1][2])
    bare = _last_bare(tail)
    if bare and not (
        last and _CONTEXT.search(tail.split(bare)[0]) and "." not in tail.split(bare)[0]
    ):
        return bare
    if last is None:
        return ""
    # spans that `and`, `or` or a comma join are one answer
    first = len(spans) - 1
    while first and _is_given(text, spans[first - 1], spans[first]):
        first -= 1  # in `$k = 7$ is the least value of $k$` the name is not the answer
    final = first
    while first and _joins(text[spans[first - 1].end() : spans[first].start()]):
        if _is_derived(text, spans[first - 1], spans[final]):
            break
        first -= 1
    return _join_spans(text, spans[first])


def _is_given(text: str, previous: re.Match[str], span: re.Match[str]) -> bool:
    """True for a name or number of the question: `values of $B$`, `when $x > 0$`."""
    between = text[previous.end() : span.start()]
    formula = _inner(span)
    if _BARE_NAME.fullmatch(formula):
        return True
    if ". " in between or "\n" in between:
        return False
    if _CONDITION.search(between) and _CONDITIONAL.fullmatch(formula):
        return True
    return _CONTEXT.search(between) is not None


def _is_derived(text: str, previous: re.Match[str], last: re.Match[str]) -> bool:
    """True for `$k-1 = 1$, and $k = 2$`: the last equation is the answer, not both."""
    if re.search(r"[A-Za-z]{2}", re.sub(r"\band\b", "", text[previous.end() : last.start()])):
        return False
    left, equals, _ = _inner(previous).partition("=")
    return "=" in _inner(last) and not (equals and _NAME.fullmatch(left.strip()))


def _joins(between: str) -> bool:
    return len(between) <= 40 and _JOINED.fullmatch(between) is not None


def _last_bare(text: str) -> str:
    """Returns the run of formula characters, outside of any delimiters, that holds the last digit.

    Words end a run, except names of functions and units.
    """
    lines = [line for line in text.split("\n") if re.search(r"\d", line)]
    if not lines:
        return ""
    line = lines[-1]
    if (results := list(_RESULT.finditer(line))) and not _FURTHER.search(line[results[-1].end() :]):
        line = line[: results[-1].end()]
    line = _OUT_OF.sub(r"\1/\2", _PART.sub(r"\1", line))
    last_digit = max(m.end() for m in re.finditer(r"\d", line))
    begin, end = 0, len(line)
    for match in _WORD.finditer(line):
        word = match[0]
        if word[0] == "\\" or (len(word) == 1 and word not in "aI"):
            continue
        if word in _FUNCTIONS or word in _JOINING or word.casefold() in MONTHS:
            continue
        if line[match.start() - 1 : match.start()] in "{_" and match.start():
            continue  # inside \text{...} or \begin{...}
        if match.end() < last_digit:
            if word in _UNIT_WORDS and re.match(r"\s*\^", line[match.end() :]):
                continue
            begin = match.end()
        elif match.start() >= last_digit:
            end = match.end() if word in _UNIT_WORDS else match.start()
            break
    if _DENIED.search(line[:begin]):
        return ""
    run = line[begin:end]
    run = re.split(r"[.!?;:](?=\s)(?=.*\d)|[:;]\s", run)[-1]
    run = re.sub(r"^(?:[\s,;:!*_)\]=>]|\.(?!\d))*(?:\b(?:and|or)\b[\s,]*)*", "", run)
    run = re.sub(r"(?<![\s,;:(/])[\s,;:(/]*(?:\b(?:and|or)\b[\s,]*)*$", "", run)
    left, equals, right = run.rpartition("=")
    if equals and not re.search(r"[A-Za-z]", left):
        run = right  # words have cut the calculation off: of 4 inches + 1 = 5, its end
    return run.strip().rstrip(_TRAILING)
