#!/usr/bin/env python3
# ruff: noqa: RUF001 - rules that write answers with unicode characters
r"""Counts wrong decisions of the built-in `math` reward on rewritten answers of real problems.

    python tools/bench/bench_math_answers.py DATA_DIR [--scale 1] [--show 20] [--peers]

DATA_DIR holds the answers (golds) of MATH, GSM8K, AIME and AMC: `*.jsonl` and `*.json` files with
the field `answer`.
Rules below rewrite each gold into answers that are right or wrong by construction. SIZES says
how many of each class are scored, `--scale` multiplies it. `--peers` adds math-verify with its
default extraction, as AReaL and verl call it.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from pebble import ProcessPool

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_async_rl.data.math_rows import boxed_answer
from megatron_async_rl.reward import math_answer

SIZES = {  # answers per class
    "equivalent": 6600,
    "unboxed right": 1368,
    "wrong": 6805,
    "unboxed wrong": 719,
    "hedged": 491,
    "unfinished thinking": 264,
    "same": 4000,
    "solution": 2000,  # of the data set, without its box or its line with ####
}
REFUSED = ("equivalent", "unboxed right", "same", "solution")  # classes of right answers
LIMIT_S = 5.0  # of one score, which then counts as refused


class Case(NamedTuple):
    kind: str
    rule: str
    response: str
    gold: str

    @property
    def right(self) -> bool:
        return self.kind in REFUSED


Rule = Callable[[str, random.Random], "str | None"]

INTEGER = re.compile(r"-?\d+")
FRAC = re.compile(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}")
DECIMAL = re.compile(r"-?\d*\.\d+")
PAIR = re.compile(r"([\[(])\s*([^,()\[\]]+),\s*([^,()\[\]]+)([\])])")
BASE = re.compile(r"(\d+)_\{?(\d+)\}?")
RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|in|equiv)")
BOX = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}(?!.*\\boxed)", re.DOTALL)
DEGREES = re.compile(r"(-?\d+)\^\{?\\circ\}?")
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
LOWERED = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
UNITS = (
    "cm",
    "meters",
    "people",
    "dollars",
    "pages",
    "square feet",
    "m^2",
    "km/h",
    "hours",
    "apples",
)


def integer(text: str) -> int | None:
    text = re.sub(r",(?:\\!)?(?=\d{3}(?!\d))", "", text)
    return int(text) if INTEGER.fullmatch(text) else None


def fraction(text: str) -> tuple[str, int, int] | None:
    match = FRAC.fullmatch(text)
    return (match[1], int(match[2]), int(match[3])) if match else None


def on_integer(change: Callable[[int, random.Random], str | None]) -> Rule:
    def rule(gold: str, rng: random.Random) -> str | None:
        number = integer(gold)
        return None if number is None else change(number, rng)

    return rule


def on_fraction(change: Callable[[str, int, int], str | None]) -> Rule:
    def rule(gold: str, rng: random.Random) -> str | None:
        parts = fraction(gold)
        return None if parts is None else change(*parts)

    return rule


def on_pair(change: Callable[[str, str, str, str], str | None]) -> Rule:
    def rule(gold: str, rng: random.Random) -> str | None:
        match = PAIR.fullmatch(gold.replace("\\left", "").replace("\\right", ""))
        return change(match[1], match[2].strip(), match[3].strip(), match[4]) if match else None

    return rule


def replaced(old: str, new: str) -> Rule:
    return lambda gold, rng: re.sub(old, new, gold) if re.search(old, gold) else None


def decimal_of(sign: str, above: int, below: int) -> str | None:
    rest = below
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1 or below > 1000:
        return None
    return f"{sign}{above / below:.10f}".rstrip("0").rstrip(".")


def mixed(sign: str, above: int, below: int, form: str) -> str | None:
    whole, part = divmod(above, below)
    if not whole or not part:
        return None
    return sign + form.format(whole=whole, above=part, below=below)


def inequality(opening: str, low: str, high: str, closing: str) -> str | None:
    if opening + closing == "()" and "infty" not in low + high:
        return None  # a point or an interval
    signs = ["\\le" if opening == "[" else "<", "\\le" if closing == "]" else "<"]
    if "infty" in low and "infty" in high:
        return None
    if "infty" in high:
        return f"x {'>' if opening == '(' else chr(92) + 'ge'} {low}"
    return f"x {signs[1]} {high}" if "infty" in low else f"{low} {signs[0]} x {signs[1]} {high}"


def shuffled_list(gold: str, rng: random.Random, joint: str = ", ") -> str | None:
    if re.search(
        r"[()\[\]{}]", gold.replace("\\frac{", "").replace("\\sqrt{", "").replace("}", "")
    ):
        return None
    if "\\!" in gold or gold.endswith("\\"):
        return None
    parts = [part.strip() for part in gold.split(",")]
    if len(parts) < 2 or len(set(parts)) < len(parts) or integer(gold) is not None:
        return None
    return joint.join(parts[1:] + parts[:1])


def swapped_terms(gold: str, rng: random.Random) -> str | None:
    match = re.fullmatch(r"([^-+=,(){}\\<>]+)\+([^-+=,(){}<>]+)", gold)
    return f"{match[2].strip()} + {match[1].strip()}" if match else None


def with_unit(gold: str, rng: random.Random, form: str) -> str | None:
    if integer(gold) is None and not DECIMAL.fullmatch(gold):
        return None
    return form.format(gold=gold, unit=rng.choice(UNITS))


def unicode_form(gold: str, rng: random.Random) -> str | None:
    text = gold.replace("\\pi", "π").replace("\\infty", "∞").replace("\\cup", "∪")
    text = (
        re.sub(r"\\sqrt\{(\d+)\}", r"√\1", text).replace("^\\circ", "°").replace("^{\\circ}", "°")
    )
    text = re.sub(r"(?<=[a-z)])\^(?:\{2\}|2(?!\d))", "²", text).replace("\\le ", "≤ ")
    text = re.sub(r"^-", "−", text) if not text[1:2].isalpha() else text
    return text if text != gold else None


EQUIVALENT: dict[str, Rule] = {
    "spaces": lambda gold, rng: (
        f" {gold} ".replace(",", " , ")
        if integer(gold) is None and "{,}" not in gold and "\\!" not in gold
        else None
    ),
    "dollars": lambda gold, rng: f"${gold}$",
    "full stop": lambda gold, rng: f"{gold}.",
    "bold": lambda gold, rng: f"\\mathbf{{{gold}}}" if integer(gold) is not None else f"**{gold}**",
    "left right": replaced(r"(?<![\\a-z])\(([^()]*)\)", r"\\left(\1\\right)"),
    "bigl": lambda gold, rng: (
        gold.replace("\\left", "")
        .replace("\\right", "")
        .replace("(", "\\bigl(")
        .replace(")", "\\bigr)")
        if "(" in gold
        else None
    ),
    "dfrac": replaced(r"\\frac", r"\\dfrac"),
    "tfrac": replaced(r"\\frac", r"\\tfrac"),
    "slash": on_fraction(lambda s, a, b: f"{s}{a}/{b}"),
    "short frac": on_fraction(lambda s, a, b: f"{s}\\frac{a}{b}" if a < 10 and b < 10 else None),
    "frac decimal": on_fraction(decimal_of),
    "mixed": on_fraction(lambda s, a, b: mixed(s, a, b, r"{whole}\frac{{{above}}}{{{below}}}")),
    "mixed plain": on_fraction(lambda s, a, b: mixed(s, a, b, "{whole} {above}/{below}")),
    "minus inside": on_fraction(lambda s, a, b: f"\\frac{{-{a}}}{{{b}}}" if s else None),
    "unreduced": on_fraction(lambda s, a, b: f"{s}\\frac{{{3 * a}}}{{{3 * b}}}"),
    "equals": lambda gold, rng: None if re.search(r"[=<>,]|\\[lgn]e", gold) else f"x = {gold}",
    "function equals": lambda gold, rng: (
        None if re.search(r"[=<>,]|\\[lgn]e", gold) else f"f(3) = {gold}"
    ),
    "unicode": unicode_form,
    "decimal zeros": on_integer(lambda n, rng: f"{n}.00" if abs(n) < 10**6 else None),
    "thousands": on_integer(lambda n, rng: f"{n:,}" if abs(n) > 999 else None),
    "thousands braces": on_integer(
        lambda n, rng: f"{n:,}".replace(",", "{,}") if abs(n) > 999 else None
    ),
    "thousands space": on_integer(
        lambda n, rng: f"{n:,}".replace(",", "\\,") if abs(n) > 999 else None
    ),
    "exponent": on_integer(lambda n, rng: f"{n / 100:g}e2" if 0 < n < 10**5 else None),
    "power of ten": on_integer(
        lambda n, rng: f"{n / 100:g} \\times 10^2" if 0 < n < 10**5 else None
    ),
    "currency": on_integer(
        lambda n, rng: rng.choice(("\\${}", "€{}", "{} dollars", "{} USD", "£{}")).format(n)
    ),
    "text unit": lambda gold, rng: with_unit(gold, rng, r"{gold}\text{{ {unit}}}"),
    "plain unit": lambda gold, rng: with_unit(gold, rng, "{gold} {unit}"),
    "tilde unit": lambda gold, rng: with_unit(gold, rng, r"{gold}~\mathrm{{{unit}}}"),
    "percent": on_integer(lambda n, rng: f"{n}\\%" if 0 < n <= 100 else None),
    "no percent": replaced(r"^([\d.]+)\\%$", r"\1"),
    "no unit": replaced(r"^(-?[\d.]+)\s*\\(?:text|mbox)\{[^{}]*\}(?:\^\d)?$", r"\1"),
    "no degrees": replaced(rf"^{DEGREES.pattern}$", r"\1"),
    "degree": replaced(DEGREES.pattern, r"\1\\degree"),
    "degree words": replaced(rf"^{DEGREES.pattern}$", r"\1 degrees"),
    "degree spaces": replaced(DEGREES.pattern, r"\1 ^ \\circ"),
    "base parentheses": replaced(rf"^{BASE.pattern}$", r"(\1)_{\2}"),
    "base braces": replaced(rf"^{BASE.pattern}$", r"\1_{\2}"),
    "inequality": on_pair(inequality),
    "list order": shuffled_list,
    "list and": lambda gold, rng: shuffled_list(gold, rng, "\\text{ and }"),
    "terms": swapped_terms,
    "root order": replaced(r"^(\d+)\\sqrt\{(\d+)\}$", r"\\sqrt{\2} \\cdot \1"),
    "root half": replaced(r"^(\d+)\\sqrt\{(\d+)\}$", r"\1 \\cdot \2^{1/2}"),
    "root plain": replaced(r"^(\d+)\\sqrt\{(\d+)\}$", r"\1sqrt(\2)"),
    "pi product": replaced(r"^(\d+)\s*\\pi$", r"\1 \\cdot \\pi"),
    "pi units": replaced(r"^(\d+)\s*\\pi$", r"\1\\pi \\text{ cm}^2"),
    "plain word": replaced(r"^\\text\{\s*([A-Za-z ]+)\}$", r"\1"),
    "textbf word": replaced(r"^\\text\{\s*([A-Za-z ]+)\}$", r"\\textbf{\1}"),
    "choice": replaced(r"^\\text\{\(?([A-E])\)?\}$|^([A-E])$", r"\\textbf{(\1\2)}\\ 12"),
    "choice plain": replaced(r"^\\text\{\(?([A-E])\)?\}$|^([A-E])$", r"\1\2) 12"),
    "bmatrix": replaced(r"pmatrix", "bmatrix"),
    "set order": replaced(r"^\\\{\s*([^,{}]+),([^,{}]+)\\\}$", r"\\{\2, \1\\}"),
    "plus minus": replaced(r"^([^,]+?) \+ ([^,+-]+), ?\1 - \2$", r"\1 \\pm \2"),
    "squared plain": replaced(r"\^\{(\d)\}", r"^\1"),
    "powers in braces": replaced(r"\^(\d)", r"^{\1}"),
    "dot product": lambda gold, rng: (
        None if "\\" in gold else replaced(r"(?<=\d)(?=[a-z])", r" \\cdot ")(gold, rng)
    ),
    "approximation": on_fraction(
        lambda s, a, b: f"{s}\\frac{{{a}}}{{{b}}} \\text{{ (approximately }} {s}{a / b:.3f})"
    ),
    "decimal too": on_fraction(
        lambda s, a, b: (
            f"{s}\\frac{{{a}}}{{{b}}} \\text{{ (or }} {decimal})"
            if (decimal := decimal_of(s, a, b))
            else None
        )
    ),
    "out of": on_fraction(lambda s, a, b: None if s else f"{a} out of {b}"),
    "raised": on_fraction(
        lambda s, a, b: None if s else f"{a}".translate(RAISED) + "⁄" + f"{b}".translate(LOWERED)
    ),
    "mixed and": on_fraction(
        lambda s, a, b: mixed(s, a, b, r"{whole}\text{{ and }}\frac{{{above}}}{{{below}}}")
    ),
    "slash thousands": on_fraction(lambda s, a, b: f"{s}{a:,}/{b:,}" if max(a, b) > 999 else None),
    "text comma": on_integer(
        lambda n, rng: f"{n:,}".replace(",", "\\text{,}") if abs(n) > 999 else None
    ),
    "minus in braces": on_integer(lambda n, rng: f"{{-}}{-n}" if n < 0 else None),
    "siunitx": on_integer(lambda n, rng: rng.choice((f"\\num{{{n}}}", f"\\SI{{{n}}}{{cm}}"))),
    "sentence": on_integer(lambda n, rng: f"\\text{{The number of ways is }} {n}"),
    "per hour": on_integer(lambda n, rng: f"{n}\\text{{ \\$/hour}}"),
    "plural": on_integer(lambda n, rng: f"{n} gallon(s)"),
    "unit in parentheses": on_integer(lambda n, rng: f"{n} \\ (\\text{{gallons}})"),
    "operation": on_integer(lambda n, rng: f"3 \\,\\#\\, 4 = {n}"),
    "event": on_fraction(lambda s, a, b: f"P(X \\ge 2) = {s}\\frac{{{a}}}{{{b}}}"),
    "square": lambda gold, rng: f"{gold} \\quad \\square",
    "tag": lambda gold, rng: f"{gold}\\tag{{1}}",
    "no delimiters": lambda gold, rng: f"\\left. {gold} \\right.",
    "small": lambda gold, rng: f"\\small {gold}",
    "underline": replaced(r"^(-?\\frac\{.*\})$", r"\\underline{\1}"),
    "degree raised": replaced(rf"^{DEGREES.pattern}$", r"\1^\\degree"),
    "angle": replaced(rf"^{DEGREES.pattern}$", r"\\ang{\1}"),
    "base word": replaced(rf"^{BASE.pattern}$", r"\1_{\\text{base } \2}"),
    "base chain": lambda gold, rng: (
        f"{gold} = {int(match[1], int(match[2]))}_{{10}}"
        if (match := BASE.fullmatch(gold)) and int(match[2]) < 11
        else None
    ),
    "choice of an answer": replaced(r"^\\text\{\(?([A-E])\)?\}$", r"\\text{Answer choice \1}"),
    "open matrix": lambda gold, rng: (
        gold.replace("\\begin{pm", "\\left[\\begin{m").replace(
            "\\end{pmatrix}", "\\end{matrix}\\right]"
        )
        if gold.startswith("\\begin{pm") and gold.endswith("\\end{pmatrix}")
        else None
    ),
    "outward": replaced(r"^\((-?\\infty, ?-?\d+)\)$", r"]\1["),
    "such that": lambda gold, rng: (
        f"\\text{{all }} x \\text{{ such that }} {text}"
        if (text := on_pair(inequality)(gold, rng))
        else None
    ),
    "solutions are": lambda gold, rng: (
        f"\\text{{The solutions are }} {text}" if (text := shuffled_list(gold, rng)) else None
    ),
    "names turned": replaced(r"^([A-Z]+) ?= ?(\d+), ([A-Z]+) ?= ?(\d+)$", r"\3=\4, \1=\2"),
}

WRONG: dict[str, Rule] = {
    "plus one": on_integer(lambda n, rng: str(n + rng.choice((-1, 1, 2, 10)))),
    "sign": lambda gold, rng: (
        f"-{gold}"
        if (integer(gold) or (fraction(gold) and not gold.startswith("-"))) and gold != "0"
        else None
    ),
    "tenfold": on_integer(lambda n, rng: f"{n}0" if n else None),
    "tenth": on_integer(lambda n, rng: f"{n / 10:g}" if 0 < n < 10**5 else None),
    "near": on_integer(lambda n, rng: f"{n}.001"),
    "near percent": on_integer(lambda n, rng: f"{n + 1}\\%" if n < 50 else None),
    "inverse": on_fraction(lambda s, a, b: f"{s}\\frac{{{b}}}{{{a}}}" if a not in (0, b) else None),
    "numerator": on_fraction(lambda s, a, b: f"{s}\\frac{{{a + 1}}}{{{b}}}"),
    "coarse decimal": on_fraction(
        lambda s, a, b: f"{s}{a / b:.3f}" if (Fraction(a, b) * 1000).denominator > 1 else None
    ),
    "mixed of proper": on_fraction(lambda s, a, b: f"{s}1\\frac{{{a}}}{{{b}}}" if a < b else None),
    "swapped": on_pair(lambda o, a, b, c: f"{o}{b},{a}{c}" if a != b else None),
    "brackets": on_pair(lambda o, a, b, c: f"{'[' if o == '(' else '('}{a},{b}{c}"),
    "one of the pair": on_pair(lambda o, a, b, c: a),
    "extra guess": on_integer(lambda n, rng: f"{n}, {n + 1}"),
    "extra guess with unit": on_integer(lambda n, rng: f"{n}\\text{{ cm}}, {n + 1}\\text{{ cm}}"),
    "subset": lambda gold, rng: gold.split(",")[0] if shuffled_list(gold, rng) else None,
    "base": replaced(rf"^{BASE.pattern}$", r"\1_{11}"),
    "base digits": replaced(rf"^{BASE.pattern}$", r"1\1_{\2}"),
    "root degree": replaced(r"\\sqrt\{", r"\\sqrt[3]{"),
    "lost root": replaced(r"^(\d+)\\sqrt\{(\d+)\}$", r"\1"),
    "lost pi": replaced(r"^(\d+)\s*\\pi$", r"\1"),
    "times variable": on_integer(lambda n, rng: f"{n}x" if n else None),
    "times pi": on_integer(lambda n, rng: f"{n}\\pi" if n else None),
    "factorial": on_integer(lambda n, rng: f"{n}!" if 2 < n < 30 else None),
    "term sign": lambda gold, rng: (
        gold.replace("+", "-", 1) if re.fullmatch(r"[^,()+]*[a-z\d] ?\+ ?[^,()+]+", gold) else None
    ),
    "power": replaced(r"\^(?:\{2\}|2)(?!\d)", "^3"),
    "other word": replaced(r"^\\text\{\s*([A-Za-z])([A-Za-z]+)\}$", r"\\text{\2\1}"),
    "letters": replaced(r"^(\d+)x", r"\1y"),
    "other degrees": replaced(rf"^{DEGREES.pattern}$", r"1\1^\\circ"),
    "several": on_integer(lambda n, rng: f"{n} \\ne {n + 1}"),
    "names mixed up": replaced(r"^([A-Z]+) ?= ?(\d+), ([A-Z]+) ?= ?(\d+)$", r"\1=\4, \3=\2"),
    "another plane": replaced(r"^[^=]*[a-z][^=]*= ?0$", "x + y - 7z = 0"),
    "no plane": replaced(r"^[^=]*[a-z][^=]*= ?0$", "0"),
    "range of a list": replaced(r"^(-?\d+), ?(-?\d+)$", r"\1 < x < \2"),
    "names of others": on_pair(
        lambda o, a, b, c: f"y = {a}, x = {b}" if a != b and o + c == "()" else None
    ),
    "denied": on_integer(lambda n, rng: f"\\text{{The answer is not }} {n}"),
    "asked": on_integer(lambda n, rng: f"{n}?\\ {n + 1}"),
    "approximation of another": on_fraction(
        lambda s, a, b: f"{s}\\frac{{{a}}}{{{b}}} \\text{{ or approximately }} {s}{a / b + 1:.3f}"
    ),
    "out of more": on_fraction(lambda s, a, b: None if s else f"{a} out of {b + 1}"),
    "other chain": lambda gold, rng: (
        f"{gold} = {int(match[1], int(match[2])) + 1}_{{10}}"
        if (match := BASE.fullmatch(gold)) and int(match[2]) < 11
        else None
    ),
}

TEMPLATES = {
    "answer is": "So we get it.\n\nThe answer is ${}$.",
    "final answer": "We add both.\nThe final answer is **${}$**.",
    "answer colon": "Step 1. 3 + 4 = 7.\n\n**Answer:** ${}$",
    "hashes": "We add 3 and 4.\n#### {}",
    "display": "Adding both sides we get 12 = 3x. Hence\n\\[ x = {} \\]",
    "therefore": "Since 2 is prime, we divide by 3. Therefore, the value is ${}$.",
    "parentheses": "So the answer is \\({}\\).",
    "plain": "The final answer is {}.",
    "bold": "There are 4 steps. So the answer is **{}**.",
    "answer line": "First, 12 / 4 = 3.\nFinal Answer: {}",
    "arrow": "12 / 4 = 3.\nAnswer -> ${}$",
    "dash": "12 / 4 = 3.\n**Final Answer** — ${}$",
    "Chinese": "因为 12 / 4 = 3,所以答案是 ${}$。",
    "French": "On a 12 / 4 = 3.\nRéponse : ${}$",
    "Russian": "12 / 4 = 3.\nОтвет: ${}$.",
    "in the formula": "12 / 4 = 3.\n$$\\text{{Answer: }} {}$$",
    "fence": "12 / 4 = 3.\nAnswer:\n```\n{}\n```",
    "HTML": "12 / 4 = 3.\nThe answer is: <b>${}$</b>",
    "end token": "12 / 4 = 3.\nAnswer: ${}$<|eot_id|>",
    "remark": "Hence it is ${}$. Note that equality holds when $(a,b)=(1,3)$.",
    "drawing": "Hence it is ${}$.\n[asy]\ndot((0,7));\n[/asy]",
    "taken back": "I first thought the answer is $7x$, but that counts twice. So it is ${}$.",
}

HEDGED = {
    "or in the box": r"\boxed{{{a} \text{{ or }} {b}}}",
    "or, wrong first": r"\boxed{{{b} \text{{ or }} {a}}}",
    "comma in the box": r"\boxed{{{a}, {b}}}",
    "two boxes": r"It is \boxed{{{a}}} or \boxed{{{b}}}.",
    "two boxes, wrong first": r"It is \boxed{{{b}}} or \boxed{{{a}}}.",
    "two boxes, maybe": r"\boxed{{{b}}}, or maybe \boxed{{{a}}}",
    "stated": "The answer is {a} or {b}.",
    "stated, wrong first": "The answer is {b} or {a}.",
    "dollars": "The answer is ${b}$ or ${a}$.",
    "questions": "The answer is {a}? Or {b}?",
    "taken back": "I first thought the answer is ${a}$, but that counts twice. So it is ${b}$.",
    "corrected": "The answer is {a}... no, {b}.",
    "in parentheses": "{a} (or maybe {b})",
}

THINKING = {
    "open": "<think>Let me see, it may be \\boxed{{{}}}, but let me check",
    "stated": "<think>The answer is ${}$. But wait",
    "late": "Thinking: <think>x = {}",
    "reopened": "<think>12</think> so <think>the answer is \\boxed{{{}}}",
}

INSIDE = (r"\sqrt{{{}}}", "{}x", r"{}\pi", "{}!", r"\frac{{1}}{{{}}}", "{}^2", "2^{{{}}}")
AROUND = ("The answer is ${}$.", "**${}$**", "Hence $y = {}$.", "So it is {}.")


def read_golds(folder: Path) -> Iterator[str]:
    """Yields the golds of all files, without those that this benchmark cannot rewrite safely."""
    for row in read_rows(folder):
        answer = str(row.get("answer", ""))
        if "####" in answer:
            answer = answer.rpartition("####")[2]
        answer = boxed_answer(answer) or answer
        if answer := answer.strip().removesuffix(".0"):
            yield answer


def read_solutions(folder: Path) -> Iterator[Case]:
    """Yields the worked solutions of GSM8K and of MATH, which end in the answer without a box."""
    for row in read_rows(folder):
        text, mark, gold = str(row.get("answer", "")).rpartition("####")
        if mark:
            text = re.sub(r"<<[^<>]*>>", "", text).strip()
            yield Case("solution", "GSM8K", text, gold.strip())
        elif "subject" in row and (box := BOX.search(row["solution"])):
            text = row["solution"][: box.start()] + box[1] + row["solution"][box.end() :]
            yield Case("solution", "MATH", text, box[1])


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.json")]):
        text = path.read_text()
        yield from (
            json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
        )


def make_cases(
    golds: list[str], solutions: list[Case], scale: float, rng: random.Random
) -> list[Case]:
    classes: dict[str, list[Case]] = {name: [] for name in SIZES} | {"solution": solutions}
    for gold in golds:

        def add(kind: str, rule: str, response: str, gold: str = gold) -> None:
            classes[kind].append(Case(kind, rule, response, gold))

        add("same", "same", f"So it is $\\boxed{{{gold}}}$.")
        for rule, rewrite in EQUIVALENT.items():
            if (text := rewrite(gold, rng)) is not None:
                add("equivalent", rule, f"So it is $\\boxed{{{text}}}$.")
        wrongs = {rule: text for rule, make in WRONG.items() if (text := make(gold, rng))}
        for rule, text in wrongs.items():
            add("wrong", rule, f"It is $\\boxed{{{text}}}$.")
            for name in ("answer is", "hashes", "display", "bold"):
                if name != "display" or not RELATION.search(text):
                    add("unboxed wrong", f"{name}, {rule}", TEMPLATES[name].format(text))
        for rule, template in TEMPLATES.items():
            if ("$" in gold and "$" in template) or (rule == "display" and RELATION.search(gold)):
                continue
            add("unboxed right", rule, template.format(gold))
        if integer(gold) is not None and gold not in ("0", "1", "2") and gold[0] != "-":
            for inside, template in itertools.product(INSIDE, AROUND):
                text = inside.format(gold)
                if text not in (f"{gold}x", f"{gold}!") or template != "So it is {}.":
                    add("unboxed wrong", f"inside {inside}", template.format(text))
        for wrong in list(wrongs.values())[:1]:
            if integer(gold) is None and fraction(gold) is None:
                continue
            for rule, template in HEDGED.items():
                add("hedged", rule, template.format(a=gold, b=wrong))
        for rule, template in THINKING.items():
            add("unfinished thinking", rule, template.format(gold))
    for cases in classes.values():
        rng.shuffle(cases)
    # every rule gets its share: rare rules first
    return [
        case
        for name, cases in classes.items()
        for case in _balanced(cases, int(scale * SIZES[name]))
    ]


def _balanced(cases: list[Case], limit: int) -> list[Case]:
    by_rule: dict[str, list[Case]] = collections.defaultdict(list)
    for case in cases:
        by_rule[case.rule].append(case)
    chosen: list[Case] = []
    queues = sorted(by_rule.values(), key=len)
    for i, queue in enumerate(queues):
        chosen += queue[: max(1, (limit - len(chosen)) // (len(queues) - i))]
    return chosen


def ours(case: Case) -> tuple[bool, str]:
    """Returns (accepted, which step decided)."""
    expected, answer = math_answer.read_answers(case.response, {"answer": case.gold})
    decided = math_answer.compare_text(expected, answer)
    if decided is not None:
        return decided, "by text"
    decided = math_answer.compare_plain(expected, answer)
    if decided is not None:
        return decided, "by form"
    return math_answer.compare_latex(expected, answer), "by math-verify"


def math_verify(case: Case) -> tuple[bool, str]:
    parse, verify = math_answer.load_math_verify()
    gold = parse(f"\\boxed{{{case.gold}}}", parsing_timeout=None)
    accepted = verify(gold, parse(case.response, parsing_timeout=None), timeout_seconds=None)
    return accepted, "by math-verify"


def timed(score: Callable[[Case], tuple[bool, str]], case: Case) -> tuple[bool, str, float]:
    """Returns (accepted, which step decided, CPU seconds)."""
    started = time.process_time()
    try:
        accepted, step = score(case)
    except Exception:
        accepted, step = False, "by math-verify"
    return accepted, step, time.process_time() - started


def measure(
    name: str, score: Callable[[Case], tuple[bool, str]], cases: list[Case], show: int
) -> None:
    """Prints wrong decisions and CPU times; a score that takes LIMIT_S is killed."""
    total: collections.Counter[str] = collections.Counter()
    errors: dict[str, list[Case]] = collections.defaultdict(list)
    cpu_s: dict[str, list[float]] = collections.defaultdict(list)
    pool = ProcessPool(max_workers=1, context=multiprocessing.get_context("fork"))
    scored = [pool.schedule(timed, (score, case), timeout=LIMIT_S) for case in cases]
    for case, future in zip(cases, scored, strict=True):
        try:
            accepted, step, taken_s = future.result()
        except TimeoutError:
            accepted, step, taken_s = False, "by math-verify", LIMIT_S
        cpu_s[step].append(taken_s)
        total[case.kind] += 1
        if accepted != case.right:
            errors[case.kind].append(case)
    pool.close()
    pool.join()
    for kind, count in total.items():
        wrong = len(errors[kind])
        verb = "refused" if kind in REFUSED else "accepted"
        print(f"{name}: {kind}: {verb} {wrong} of {count}", flush=True)
        rules = collections.Counter(case.rule for case in errors[kind]).most_common(show)
        for rule, number in rules:
            case = next(case for case in errors[kind] if case.rule == rule)
            print(f"    {number} {rule}: gold {case.gold!r}: {case.response!r}")
    times = [one for step in cpu_s.values() for one in step]
    steps = ", ".join(
        f"{len(one)} {step} at {1e6 * sum(one) / len(one):.1f} us" for step, one in cpu_s.items()
    )
    mean_ms = 1e3 * sum(times) / len(times)
    print(f"{name}: {len(times)} scores, mean {mean_ms:.3f} ms CPU: {steps}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the number of answers")
    parser.add_argument("--show", type=int, default=0, help="rules with errors to print, per class")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    golds = sorted(set(read_golds(arguments.data)))
    rng.shuffle(golds)
    cases = make_cases(golds, [*read_solutions(arguments.data)], arguments.scale, rng)
    math_answer.load_math_verify()
    print(f"{len(golds)} golds, {len(cases)} cases")
    measure("built-in", ours, cases, arguments.show)
    if arguments.peers:
        measure("math-verify", math_verify, cases, arguments.show)


if __name__ == "__main__":
    main()
