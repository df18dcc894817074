r"""Reads LaTeX formulas into syntax trees; evaluation.py computes their values.

Two formulas are equal if they have the same values at several points: variables get fixed rational
values, so that polynomials and fractions are compared exactly. `parse` takes bounded time and
raises Unreadable for unknown notation.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from megatron_async_rl.reward.math.evaluation import (
    CONSTANTS,
    FUNCTIONS,
    Contradiction,
    Node,
    Unreadable,
    is_whole,
    mixed,
    read_numeral,
)

_MAX_DEPTH = 40
_MAX_TOKENS = 400

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:[eE][-+]?\d+(?![\d.]))?|\.\d+)"
    r"|(?P<command>\\[A-Za-z]+|\\.)|(?P<word>[A-Za-z]+)|(?P<symbol>\S))"
)
_GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar "
    "aleph".split()
)
_WORDS = sorted((*FUNCTIONS, "frac", "sqrt", "cbrt", "pi"), key=len, reverse=True)
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Node:
    """Returns the syntax tree of a formula. Raises Unreadable."""
    tokens: list[str] = []
    for match in _TOKEN.finditer(text):
        word = match["word"]
        if word:
            tokens += _split_word(word)
        else:
            tokens.append(match[match.lastgroup or 0].strip())
    if not tokens or len(tokens) > _MAX_TOKENS:
        raise Unreadable
    parser = _Parser(tokens)
    node = parser.sum()
    if parser.position < len(tokens):
        raise Unreadable
    return node


def _split_word(word: str) -> list[str]:
    """Splits letters into variables and the names of functions: xsin is x and \\sin."""
    parts = []
    while word:
        for name in _WORDS:
            if len(word) >= len(name) and word.startswith(name):
                parts.append(f"\\{name}")
                word = word[len(name) :]
                break
        else:
            parts.append(word[0])
            word = word[1:]
    return parts


class _Parser:
    """Recursive descent over tokens; each method returns the node of its rule."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.bars = 0  # open | signs: the next one closes

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise Unreadable
        self.position += 1
        return token

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable
        node = self.product()
        while (sign := self.peek()) in ("+", "-"):
            self.take()
            node = (sign, node, self.product())
        self.depth -= 1
        return node

    def product(self) -> Node:
        node = self.signed()
        while True:
            token = self.peek()
            if token in ("*", "\\cdot"):
                self.take()
                node = ("*", node, self.signed())
            elif token in ("/", "\\div", ":"):
                if token == ":":
                    raise Unreadable
                self.take()
                node = ("/", node, self.signed())
            elif token == "\\frac" and is_whole(node):
                node = mixed(node, self.power())
            elif self.starts_factor(token):
                previous = node
                node = ("*", node, self.power())
                if previous[0] == node[2][0] == "number":
                    raise Contradiction  # two numbers side by side, such as `3 4`
            else:
                return node

    def starts_factor(self, token: str) -> bool:
        if token == "|":
            return self.bars == 0
        return bool(token) and (
            token[0].isalnum()
            or token in ("(", "{", "[", ".", "\\lfloor", "\\lceil", "\\{")
            or (token[0] == "\\" and token[1:] in _ATOMS)
        )

    def signed(self) -> Node:
        sign = 1
        while (token := self.peek()) in ("+", "-"):
            self.take()
            sign = -sign if token == "-" else sign
        node = self.power()
        return node if sign == 1 else ("negative", node)

    def power(self) -> Node:
        node = self.atom()
        while True:
            token = self.peek()
            if token == "^":
                self.take()
                if self.peek() == "\\circ":
                    self.take()
                    node = ("degrees", node)
                elif self.peek() == "'":
                    raise Unreadable
                else:
                    node = ("^", node, self.exponent())
            elif token == "!":
                self.take()
                node = ("!", node)
            elif token in ("\\%", "%"):
                self.take()
                node = ("/", node, ("number", Fraction(100)))
            else:
                return node

    def exponent(self) -> Node:
        if self.peek() == "-":
            self.take()
            return ("negative", self.exponent())
        node = self.atom()
        if self.peek() == "^":  # without braces: x^y^z
            self.take()
            return ("^", node, self.exponent())
        return node

    def group(self, opening: str) -> Node:
        self.take(opening)
        bars, self.bars = self.bars, 1 if opening == "|" else 0
        node = self.sum()
        self.take(_CLOSING[opening])
        self.bars = bars
        return node

    def argument(self) -> Node:
        r"""Reads the argument of a command such as \frac: a group, or one digit or letter."""
        token = self.peek()
        if token == "{":
            return self.group("{")
        if token[:1].isdigit() and len(token) > 1:
            if not token.isdigit():
                raise Unreadable
            self.tokens[self.position : self.position + 1] = [token[0], token[1:]]
        return self.atom()

    def atom(self) -> Node:
        token = self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return ("number", read_numeral(token))
        if token in ("(", "{", "[", "|", "\\lfloor", "\\lceil"):
            self.position -= 1
            node = self.group(token)
            if token == "|":
                return ("abs", node)
            if token in ("\\lfloor", "\\lceil"):
                return (token[1:], node)
            return ("group", node)
        if token.isalpha() and len(token) == 1:
            return self.variable(token)
        if token[0] != "\\":
            raise Unreadable
        return self.command(token[1:])

    def command(self, name: str) -> Node:
        if name == "frac":
            return ("/", self.argument(), self.argument())
        if name == "binom":
            return ("binom", self.argument(), self.argument())
        if name in ("sqrt", "cbrt"):
            degree: Node = ("number", Fraction(2 if name == "sqrt" else 3))
            if self.peek() == "[":
                degree = self.group("[")
            token = self.peek()
            under = self.group("{") if token == "{" else self.atom()
            return ("root", under, degree)
        if name in FUNCTIONS and (name != "Gamma" or self.peek() == "("):
            return self.function(name)
        if name == "pi":
            return ("constant", "pi")
        if name in ("vec", "overline"):  # a vector, a conjugate
            return self.marked_variable(name)
        if name in _GREEK:
            return self.variable(name)
        raise Unreadable

    def marked_variable(self, mark: str) -> Node:
        self.take("{")
        name = self.take()
        self.take("}")
        if not name.isalpha():
            raise Unreadable
        return ("variable", f"{mark} {name}")

    def variable(self, name: str) -> Node:
        if self.peek() == "_":
            self.take()
            if self.peek() == "{":
                self.take()
                while (token := self.take()) != "}":
                    if not token.isalnum():
                        raise Unreadable
                    name += f"_{token}"
            else:
                name += f"_{self.take()}"
        elif name in CONSTANTS:
            return ("constant", name)
        return ("variable", name)

    def function(self, name: str) -> Node:
        base: Node | None = None
        exponent: Node | None = None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.argument()
            else:
                exponent = self.group("{") if self.peek() == "{" else self.atom()
        if self.peek() in ("(", "{", "[", "|"):
            node = self.power() if exponent is None else self.atom()
            if node[0] == "^" and node[1][0] == "group":  # \sin(x)^2 is a power of the sine
                return ("^", _call(name, node[1], base), node[2])
        else:
            node = self.signed()
            while self.peek() and self.starts_factor(self.peek()):
                if self.peek()[1:] in FUNCTIONS or self.peek() in ("(", "|", "[", "\\vec"):
                    break
                node = ("*", node, self.power())
        if exponent == ("negative", ("number", Fraction(1))):
            return _call(f"arc{name}", node, base)
        call = _call(name, node, base)
        return call if exponent is None else ("^", call, exponent)


_ATOMS = frozenset(("frac", "binom", "sqrt", "cbrt", "pi", "vec", "overline", *FUNCTIONS, *_GREEK))


def _call(name: str, argument: Node, base: Node | None) -> Node:
    if name not in FUNCTIONS:
        raise Unreadable
    call: Node = ("call", name, argument)
    if base is None:
        return call
    if name != "log":
        raise Unreadable
    return ("/", call, ("call", "log", base))
