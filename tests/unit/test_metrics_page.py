"""docs/metrics.md defines exactly the TensorBoard tags that the code writes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from paths import ROOT
from source_files import PACKAGE

AREAS = (
    "reward eval rollout samples staleness train critic batch probe perf sync ledger drops engine "
    "user"
)
TAG = re.compile(rf"(?:{'|'.join(AREAS.split())})(?:/[a-z0-9_<>]+)+")
WRITERS = ("controller", "observability", "recorder", "trainer")


def string_of(node: ast.AST) -> str:
    """Returns a string literal, with <> for each value in an f-string; empty for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(string_of(part) or "<>" for part in node.values)
    return ""


def tags_in(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {text for node in nodes if TAG.fullmatch(text := string_of(node))}


def is_defined(tag: str, defined: list[str]) -> bool:
    """Tells whether the page has the tag, or one with placeholders that covers it."""
    return any(re.fullmatch(known.replace("<>", "([a-z0-9]+|<>)"), tag) for known in defined)


def tags_on_page(text: str) -> list[str]:
    rows = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    return [re.sub(r"<\w+>", "<>", tag) for tag in rows]


def test_page_defines_every_tag_once() -> None:
    files = [path for name in WRITERS for path in (ROOT / PACKAGE / name).rglob("*.py")]
    # that page copies tags that others write
    written = set().union(*(tags_in(path) for path in files if path.name != "health_page.py"))
    defined = tags_on_page((ROOT / "docs" / "metrics.md").read_text())
    assert len(written) > 60
    assert [tag for tag in sorted(written) if not is_defined(tag, defined)] == []
    assert [tag for tag in defined if tag not in written] == []
    assert len(defined) == len(set(defined))
