"""The documentation names only files, modules, definitions and settings that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import get_origin

import msgspec
import pytest
from import_graph import package_modules
from packaging.specifiers import SpecifierSet
from paths import ROOT
from source_files import PACKAGE, relative_path

from megatron_async_rl.cli.doctor import GPU_VERSIONS
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.documentation import item_section
from megatron_async_rl.config.sections import Section
from megatron_async_rl.launcher.preflight import SGLANG_VERSIONS

ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FOLDERS = ("configs", "docs", "launchers", PACKAGE, "patches", "tests", "tools")
SOURCE_ENDINGS = (".md", ".patch", ".py", ".sbatch", ".sh")  # no file of a run ends like this
PASSED_THROUGH = {"megatron", "sglang"}  # their keys belong to other projects

FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
DEFINED_IN = re.compile(r"`([\w./-]+\.py)`\s*:\s*((?:`[\w.]+(?:\(\))?`(?:,| and)?\s*)+)")
# a numbered line: 1. `path/file.py`: `Name`, `other_name`
STEP = re.compile(r"^ *\d+\. .*?`[\w./-]+\.py`.*$", re.MULTILINE)


def code_spans(page: Path) -> list[str]:
    """Returns the texts in backticks outside fenced blocks."""
    return [match[2].strip() for match in CODE_SPAN.finditer(FENCE.sub("", page.read_text()))]


def fenced_words(page: Path) -> list[str]:
    return [word for block in FENCE.findall(page.read_text()) for word in block.split()]


@cache
def repository_files() -> list[str]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [relative_path(path) for path in [*found, *ROOT.glob("*")]]


def find_file(name: str) -> str:
    """Returns the path that a page means by `name`: a path, one in the package, or a file name.

    Empty if there is none.
    """
    name = name.rstrip("/")
    candidates = [name, f"{PACKAGE}/{name}", *([] if "/" in name else [f"tools/{name}"])]
    existing = [path for path in candidates if (ROOT / path).exists()]
    existing += [path for path in repository_files() if path.endswith(f"/{name}")]
    return existing[0] if existing else ""


def is_repository_path(text: str) -> bool:
    """Tells whether a text can only be a file of the repository, not one of a run's folder."""
    if not PATH.fullmatch(text):
        return False
    in_folder = "/" in text and text.split("/")[0] in FOLDERS
    return in_folder or (text.endswith(SOURCE_ENDINGS) and not text.startswith("."))


@cache
def definitions(path: str) -> set[str]:
    """Returns the names that a file defines: at the top, and in classes as Class.name."""
    names = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{prefix}{node.name}.")
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name):
                    names.add(prefix + target.id)

    add(ast.parse((ROOT / path).read_text()).body, "")
    return names


def undefined_names(text: str) -> list[str]:
    """Checks every "`path/file.py`: `Name`, `other`" of a text; a method may stand alone."""
    found = []
    for file, names in DEFINED_IN.findall(text):
        path = find_file(file)
        if not path:
            found.append(f"{file}: no such file")
            continue
        known = definitions(path) | {name.rpartition(".")[2] for name in definitions(path)}
        found += [
            f"{file}: {name} is not defined there"
            for name in re.findall(r"`([\w.]+)", names)
            if name not in known
        ]
    return found


def module_exists(name: str) -> bool:
    """Takes a module of the package, a folder of modules, or a name in a module."""
    modules = package_modules()
    owner, _, last = name.rpartition(".")
    return name in modules or (
        owner in modules and last in definitions(relative_path(modules[owner]))
    )


@cache
def setting_exists(key: str) -> bool:
    section, *names = key.split(".")
    fields = {field.name: field.type for field in msgspec.structs.fields(Config)}
    node = fields[section]
    for name in names:
        if section in PASSED_THROUGH:
            return True
        if get_origin(node) is dict and (entry := item_section(node)):
            node = entry  # `name` is the user's name of an entry
            continue
        if not (isinstance(node, type) and issubclass(node, Section)):
            return False
        below = {field.name: field.type for field in msgspec.structs.fields(node)}
        if name not in below:
            return False
        node = below[name]
    return True


@pytest.mark.parametrize("page", PAGES, ids=relative_path)
def test_paths_of_the_repository_exist(page: Path) -> None:
    words = [word for span in code_spans(page) for word in span.split()]
    named = [word for word in words if is_repository_path(word)]
    named += [
        word for word in fenced_words(page) if is_repository_path(word) and "/" in word.rstrip("/")
    ]
    written = set(re.findall(r"^```\w+ (\S+)$", page.read_text(), re.MULTILINE))  # by a tutorial
    missing = sorted({name for name in named if not find_file(name)} - written)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=relative_path)
def test_links_lead_to_files(page: Path) -> None:
    targets = LINK.findall(FENCE.sub("", page.read_text()))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=relative_path)
def test_modules_and_definitions_exist(page: Path) -> None:
    text = page.read_text()
    modules = set(re.findall(rf"\b{PACKAGE}(?:\.\w+)+\b(?!\.)", text))
    assert [name for name in sorted(modules) if not module_exists(name)] == []
    assert undefined_names(text) == []


@pytest.mark.parametrize("page", PAGES, ids=relative_path)
def test_settings_exist(page: Path) -> None:
    sections = "|".join(field.name for field in msgspec.structs.fields(Config))
    setting = re.compile(rf"(?:{sections})(?:\.\w+)+")
    keys = [
        word.partition("=")[0]
        for span in code_spans(page)
        for word in span.split()
        if setting.fullmatch(word.partition("=")[0])
    ]
    files = {"run.dir"}
    assert [key for key in sorted({*keys} - files) if not setting_exists(key)] == []


def test_the_way_of_one_sample_names_files_and_their_definitions() -> None:
    """docs/architecture.md numbers the steps: 1. `path/file.py`: `Name`."""
    steps = STEP.findall(ARCHITECTURE.read_text())
    assert len(steps) >= 5
    assert [step for step in steps if not DEFINED_IN.search(step)] == []
    assert [error for step in steps for error in undefined_names(step)] == []


@pytest.mark.parametrize("name", ["docs/installation.md", "launchers/Containerfile"])
def test_versions_to_install_on_a_gpu_host_are_supported(name: str) -> None:
    found = dict(re.findall(r"([\w-]+)==([\d.]+)", (ROOT / name).read_text()))
    assert found.keys() == {*GPU_VERSIONS, "sglang"}
    for package, versions in (GPU_VERSIONS | {"sglang": SGLANG_VERSIONS}).items():
        assert SpecifierSet(versions).contains(found[package]), package


def test_missing_names_are_found() -> None:
    assert undefined_names("`tests/support/paths.py`: `ROOT`, `SUPPORT`") == []
    assert undefined_names("`errors.py`: `ConfigError`") == []
    assert undefined_names("`errors.py`: `NoSuchError`") == [
        "errors.py: NoSuchError is not defined there"
    ]
    assert undefined_names("`no_such_file.py`: `ROOT`") == ["no_such_file.py: no such file"]
    assert module_exists(f"{PACKAGE}.errors.Error")
    assert not module_exists(f"{PACKAGE}.no_such_module")
    assert setting_exists("staleness.max_staleness") and setting_exists("megatron.lr")
    assert not setting_exists("staleness.eta")
    assert is_repository_path("tests/unit/") and not is_repository_path("samples.jsonl")
