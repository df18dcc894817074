# ruff: noqa: RUF001 - statements with unicode characters
r"""Finds the final answer in a response.

Only the text after the thinking counts; unfinished thinking has no answer. In that text the answer
is, in this order: the last complete box; the text after the last `####`, `answer:` or `answer is`;
the last formula or number. A formula counts as a whole: the 3 of $2\sqrt{3}$ is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_async_rl.data.math_rows import EMPTY_BOX, boxed_answer
from megatron_async_rl.data.thinking import after_thinking
from megatron_async_rl.reward import formulas

MAX_TEXT_CHARS = 64 * 1024  # only this much of a response's end is searched
_MAX_TAIL_CHARS = 2_000  # of an answer that is not boxed: its statement is in the last sentences
_MAX_STATEMENTS = 20  # tried from the end, each of which may search all of the tail

_STATEMENT = re.compile(
    r"####|\b(?:final\s+)?(?:answer|result|solution|option|choice|ans)\b"
    r"(?:[^\n.:=]{0,60}?\s*(?:\*\*|__)?\s*(?::|\bis\b|\bare\b|\b(?:should|must|would|will)\s+be\b(?=[\s:*]*[-+$\\\d(]))|[^\n.:=\d]{0,60}?=(?!=))\s*(?:\*\*(?=[\s:]))?:?",
    re.IGNORECASE,
)
# other languages' statements, `Answer -> 5` and `Answer - 5` at the start of a line
_OTHER_STATEMENT = re.compile(
    r"(?:答案|答え|答|解答|정답|답|Antwort|Lösung|Réponse|Respuesta|Risposta|Resposta|Ответ|Odpowiedź)"
    r"\s*(?:\*\*)?\s*(?:[:：=]|是|为|為|は|은|는|ist|est|es|è|é)\s*(?:\*\*)?\s*[:：]?|"
    r"^[\s#>*_-]*(?:final\s+)?answer[*_]*\s*(?:(?:->|=>|→|⇒|\s[-–—])(?:\s|(?=\$))|：)",
    re.IGNORECASE | re.MULTILINE,
)
_OTHER_HINT = re.compile(r"->|=>|\s-\s|Antwort|Risposta|Resposta|Respuesta")
# \text{Answer: }, maybe within a formula
_INNER_STATEMENT = re.compile(
    r"((?:\$\$?|\\\[|\\\()?)\s*\\text(?:bf)?\s*\{\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s*\}"
    r"\s*[:=]?",
    re.IGNORECASE,
)
_LINE_OF_MATRIX = re.compile(
    r"(?<=\\\\)[ \t]*\n|(?<=matrix\})[ \t]*\n|\n\s*(?=\\end\{[a-zA-Z]?matrix\})"
)
_DRAWING = re.compile(r"\[asy\](?:(?!\[asy\]).)*?\[/asy\]", re.DOTALL)
# a remark at the end: `Note that ...`, `(Here ...)`, unless it speaks of the answer
_REMARK = re.compile(
    r"(?<=[.$\]}])\s+\(?(?:Note|Notice|Alternatively|To\s+verify|To\s+check|"
    r"(?:You|We)\s+(?:can|may|could)\s+(?:also\s+)?(?:check|verify))\b"
    r"(?:(?!answer|result|\b(?:so|thus|therefore|hence|gives?|total|we\s+(?:get|have|find))\b).)*$",
    re.DOTALL,
)
_PARENTHESIS = re.compile(r"(?<=[.$\]}])\s+\([A-Z][a-z]*\s(?:(?!answer).)*\)\.?\s*$", re.DOTALL)
_VERDICT = re.compile(
    r"(?:indeed\s+)?(?:correct|right|valid|unique|reasonable|verified)\b", re.IGNORECASE
)
_END_TOKEN = re.compile(r"(?:\s*(?:<\|\w{2,30}\|>|</s>|<eos>|<end_of_turn>))+\s*$")
_ANSWER_TAG = re.compile(
    r"<(answer|final_answer|final)>((?:(?!<\1>).)*?)</\1>", re.DOTALL | re.IGNORECASE
)
_CODE = re.compile(
    r"```(?:python3?|py|sympy|cpp|c\+\+|java|javascript|js|matlab)[ \t]*\n.*?(?:\n[ \t]*```|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_BARE_BOX = re.compile(r"(?<![\\A-Za-z])boxed\{")
_TAG = re.compile(r"</?(b|strong|em|i|u|p|div|span|code|mark|center)>", re.IGNORECASE)
# a word of each case of the two expressions below
_RETRACTING = (
    "but ", "wrong", "correct", "not right", "mistake", "error", "scratch", "no,", "no:", "sorry",
    "first ", "naive", "tempting", "initial", "might think", "would have",
)  # fmt: skip
# words that withdraw a statement: `a common wrong answer is 5`, `the answer is 5, but that ...`
_DOUBTED = re.compile(
    r"\b(?:first\s+(?:thought|guess)|wrong|incorrect|naive|tempting|initial|might\s+think|"
    r"would\s+have\s+been)\b[^.!?\n]*$",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"^[^.!?\n]{0,80}?,?\s*\bbut\s+(?:that|this|it)\b|"
    r"(?:that|this|which)(?:['’]s|\s+is|\s+was)\s+(?:wrong|incorrect|not\s+(?:right|correct))|"
    r"\bI\s+made\s+an?\s+(?:mistake|error)|\bscratch\s+that\b|^[^\n]{0,60}?(?:\.\.\.|[,.?!—–-])\s*"
    r"(?:no|sorry|correction)\s*[,:]",
    re.IGNORECASE,
)
_CORRECTION = re.compile(  # the last sentence, after a statement: `Wait, it should be 6.`, `No, 6.`
    r"\b(?:(?:wait|actually|correction|sorry|oops|no|rather|hmm|I\s+mean)\b(?:[\s,.!:;\u2026\u2014]|-\s)*){1,3}"
    r"(?:(?:[^.!?\n]{0,60}\b(?:so|thus|hence)\s+)?(?:it|that|this|the\s+(?:(?:correct|right|actual)\s+\w+|total|value|sum|number|result))"
    r"(?:['\u2019]s|\s+(?:is|equals|(?:should|must|would)\s+be))\s+(?:actually\s+)?"
    r"(?P<value>(?=[-+\d$\\(*])(?:(?!\b(?:or|and)\b)[^\n!?;,])*?)|"
    r"(?P<bare>\**(?:\$[^$<>=\n]+\$|-?\d[\d.,/]*)\**))(?<!\s)[.!]?\s*$",
    re.IGNORECASE,
)
_OPTION = re.compile(
    r"\b(?:option|choice|answer)\s*\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right)", re.IGNORECASE
)
_LAST_OPTION = re.compile(  # Hence, option C. / I choose C. / Thus, C is correct.
    r"(?:(?:(?:\bis|,)\s+(?:the\s+)?(?:option|choice)|\bI\s+(?:would\s+)?(?:choose|pick|select))"
    r"\s*\(?((?-i:[A-J]))\)?(?::[^\n]*)?|"
    r"\b(?:so|thus|hence|therefore),?\s*\(?((?-i:[A-J]))\)?\s+is\s+(?:the\s+)?(?:correct|right)|"
    r"(?<!不)(?<!不能)(?<!不会)选择?\s*[:：]?\s*\(?([A-J])\)?)[.。\s]*$",
    re.IGNORECASE,
)
_ELLIPSIS = re.compile(r"(?<=\d)\.{3}(?!\d)")


def final_answer(response: str, thinking_tags: Sequence[str] = ()) -> str:
    """Returns the final answer as it is written, "" if the response has none.

    `thinking_tags`: opening and closing tags in turn, such as ("<think>", "</think>").
    """
    text = after_thinking(response, thinking_tags)[-MAX_TEXT_CHARS:]
    if not text:
        return ""
    if text.endswith((">", ">\n")):
        end = text[-_MAX_TAIL_CHARS:]  # a search in all of it could take the square of its length
        text = text[: len(text) - len(end)] + _END_TOKEN.sub("", end)
    if "```" in text:
        prose = _CODE.sub("\n", text)  # a box that a program prints is not the answer
        if boxed_answer(prose) is not None or _STATEMENT.search(prose[-_MAX_TAIL_CHARS:]):
            text = prose
    if "\\boxed" not in text:
        text = _BARE_BOX.sub(r"\\boxed{", text)
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    text = EMPTY_BOX.sub("", text)
    if "[asy]" in text:
        text = _DRAWING.sub("", text)
    if "</" in text and (tagged := list(_ANSWER_TAG.finditer(text))):
        content = tagged[-1][2].strip()
        return formulas.unwrap(content) if len(content) <= _MAX_TAIL_CHARS else content
    unclosed = text.find("\\boxed")  # cut off: its answer may be incomplete
    return _stated_answer((text if unclosed < 0 else text[:unclosed])[-_MAX_TAIL_CHARS:])


def _stated_answer(text: str) -> str:
    if "..." in text:
        text = _ELLIPSIS.sub(r"\\ldots ", text)
    if options := _OPTION.findall(text):
        return ", ".join(dict.fromkeys(options))
    if option := _LAST_OPTION.search(text):
        return option[1] or option[2] or option[3]
    text = text.replace("。", ". ")
    if "matrix}" in text:
        text = _LINE_OF_MATRIX.sub(" ", text)
    if "\\text" in text:
        text = _INNER_STATEMENT.sub(r"Answer: \1", text)
    if any(word in text for word in ("Not", "Alternatively", "check", "verify")):
        text = _REMARK.sub("", text) or text
    if text.endswith((")", ").")):
        text = _PARENTHESIS.sub("", text) or text
    if "</" in text:
        text = _TAG.sub("**", text)
    others: list[re.Match[str]] = []
    if not text.isascii() or _OTHER_HINT.search(text):
        others = list(_OTHER_STATEMENT.finditer(text))
    matches = [
        match
        for match in _STATEMENT.finditer(text)
        if not any(match.start() < other.end() < match.end() for other in others)
    ]
    statements = sorted(matches + others, key=lambda match: match.end(), reverse=True)
    correction = _CORRECTION.search(text, statements[0].end()) if statements else None
    if correction:
        corrected = correction["value"] or correction["bare"]
        if not formulas.has_sentences(corrected):
            return formulas.first(corrected)
    for match in statements[:_MAX_STATEMENTS]:
        stated = text[match.end() :].strip()
        if _VERDICT.match(stated) or _is_retracted(text, match):
            continue
        if match[0] == "####":
            found = formulas.unwrap(stated.split("\n", 1)[0])
        else:
            found = formulas.first(stated)
        if found:
            return found.rstrip("}. ") if found.count("}") > found.count("{") else found
    return formulas.last(text)


def _is_retracted(text: str, statement: re.Match[str]) -> bool:
    before = text[max(0, statement.start() - 100) : statement.start()]
    after = text[statement.end() :][:300].strip()
    nearby = f"{before} {after}".casefold()
    if not any(word in nearby for word in _RETRACTING):
        return False
    return bool(_TAKEN_BACK.search(after) or _DOUBTED.search(before))
