"""Every torchrun of the product uses trainer/torchrun.py, without torch's own c10d rendezvous.

That rendezvous keeps a pickle in a store that listens on all addresses of the host.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from source_files import PACKAGE, relative_path, source_files

UNSAFE = re.compile(
    r"rdzv[-_]backend[= ]+(?!(file|bound)\b)|--standalone"
    r"|^(c10d|torchrun|torch\.distributed\.(run|launch))$"
)
SCRIPTS = sorted(path for path in (ROOT / "launchers").iterdir() if path.is_file())


def string_constants(source: str) -> Iterator[str]:
    """Yields the strings of a module without its docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from [node.value] if id(node) not in docstrings else []


def unsafe_strings(source: str) -> list[str]:
    return [text for text in string_constants(source) if UNSAFE.search(text)]


@pytest.mark.parametrize("path", source_files(PACKAGE), ids=relative_path)
def test_no_module_names_a_c10d_rendezvous(path: Path) -> None:
    assert unsafe_strings(path.read_text()) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=relative_path)
def test_no_launcher_script_names_a_c10d_rendezvous(path: Path) -> None:
    code = "\n".join(line.partition("#")[0] for line in path.read_text().splitlines())
    assert not UNSAFE.search(code)


@pytest.mark.parametrize(
    "source",
    [
        'run("--rdzv-backend=c10d")',
        'run("--rdzv_backend c10d")',
        'run("--rdzv-backend", "c10d")',
        'run("--standalone")',
        'run("torchrun", "train.py")',
    ],
)
def test_checker_finds_a_c10d_rendezvous(source: str) -> None:
    assert unsafe_strings(source)


def test_checker_allows_the_backends_of_the_product() -> None:
    assert unsafe_strings('run("--rdzv-backend=file", f"--rdzv-backend=bound {endpoint}")') == []
