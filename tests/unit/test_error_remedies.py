"""Every error of the product names its remedy, or has an entry in docs/troubleshooting.md.

Walks all places that make an Error (errors.py) and decides by the fixed text of the message:

    a second argument (`remedy`), or a placeholder that is named so
    a clause that begins with an imperative: "...; set X to at most 4", "...: run it again"
    the rule for a value of the user: "must be", "expected an integer >= 1", "did you mean"
    a message in the tables of docs/troubleshooting.md, whose `...` stand for values
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from paths import ROOT
from source_files import PACKAGE, relative_path, source_files

from megatron_async_rl import errors

VERBS = (
    "add check choose correct free give install join lower make name raise read remove request "
    "rename restore run save see set start stop train use write"
)
IMPERATIVE = re.compile(rf"(?:[;:] |, or |, and )(?:do not )?(?:{VERBS.replace(' ', '|')})\b")
RULE = re.compile(r"\bmust (?:be|have|hold|not|start)\b|\bexpected (?!§)|\bdid you mean\b")
PAGE = ROOT / "docs" / "troubleshooting.md"
# their errors get the remedy from the reader of rows, sources.read_rows
ROW_MODULES = ("readers", "columnar", "code_tests", "math_rows", "sources")
ROW_ERRORS = [f"{PACKAGE}/data/{name}.py" for name in ROW_MODULES]


def fixed_text(node: ast.expr) -> str:
    """Returns a message with § for each value."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(fixed_text, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return fixed_text(left) + fixed_text(right)
        case _:
            return "§remedy" if "remedy" in ast.unparse(node).lower() else "§"


def error_names(trees: list[ast.Module]) -> set[str]:
    """Returns the names of errors.Error and of all classes below it."""
    names = {name for name, value in vars(errors).items() if isinstance(value, type)}
    classes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    while more := {c.name for c in classes if {ast.unparse(b) for b in c.bases} & names} - names:
        names |= more
    return names - {"Preempted"}  # not a failure


def error_sites() -> Iterator[tuple[str, str]]:
    """Yields place and fixed text of each error that is made without a remedy of its own."""
    trees = {path: ast.parse(path.read_text()) for path in source_files(PACKAGE)}
    names = error_names(list(trees.values()))
    for path, tree in trees.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in names:
                [message, *remedy] = [*call.args, *(keyword.value for keyword in call.keywords)]
                if not remedy:
                    yield f"{relative_path(path)}:{call.lineno}", fixed_text(message)


def documented_messages(page: str) -> list[re.Pattern[str]]:
    """Returns the messages in the first column of the page's tables."""
    rows = [row.split("|")[1] for row in page.splitlines() if row.startswith("| ")]
    texts = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    parts = [[re.escape(part) for part in text.split("...")] for text in texts]
    return [re.compile(".*".join(each)) for each in parts if len("".join(each)) >= 12]


def is_forwarded(text: str) -> bool:
    """Returns whether the text comes from another place, such as `{place}: {error}`."""
    return len(re.findall(r"[A-Za-z]{2,}", text.replace("§remedy", ""))) < 2


def has_remedy(text: str, documented: list[re.Pattern[str]]) -> bool:
    return bool(
        "§remedy" in text
        or IMPERATIVE.search(text)
        or RULE.search(text)
        or any(message.search(text) for message in documented)
    )


def test_every_error_names_its_remedy_or_is_in_troubleshooting() -> None:
    documented = documented_messages(PAGE.read_text())
    sites = [site for site in error_sites() if not is_forwarded(site[1])]
    assert len(sites) > 100
    missing = [
        f"{place}: {text}"
        for place, text in sites
        if not has_remedy(text, documented) and place.rpartition(":")[0] not in ROW_ERRORS
    ]
    assert missing == [], "\n".join(["", *missing])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("§ is not in §; set run.host to an address", True),
        ("§ is 3: expected an integer >= 1", True),
        ("the journal is damaged; §remedy", True),
        ("the server fell over: §", True),  # on the page below
        ("the disk was set to § and cannot be used", False),
        ("expected § from §, got §", False),
        ("§ was taken over by §", False),
    ],
)
def test_remedy_is_recognized_in_a_message(text: str, expected: bool) -> None:
    documented = documented_messages("| `the server ... over: ...` | cause | remedy |")
    assert has_remedy(text, documented) is expected
