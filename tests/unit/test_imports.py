"""The structure of the repository: which module may reach which, over any chain of imports.

All checks read the source (import_graph.py) and import no module. An error shows the chain, from
the module that breaks the rule to the one that it must not reach.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from import_graph import import_circles, import_graph, package_modules, shortest_chain
from source_files import PACKAGE, relative_path, source_files

PROCESSES = {"controller", "rollout", "reward", "trainer", "recorder", "node"}
COMMANDS = {"cli", "launcher.run", "launcher.join", "launcher.slurm"}
TORCH_USERS = {"trainer", "weights"}
TORCH_PACKAGES = {"torch", "megatron", "transformer_engine", "apex", "triton"}
SOCKETS = {f"protocol.{name}" for name in ("sockets", "hub", "link", "sync_link")}  # import zmq
MAX_FILES = 13  # of one folder, besides __init__.py
MAX_COLUMNS, MAX_LONG_LINES = 100, 0.02

Rule = tuple[str, Callable[[str], bool]]  # reason, and a test for forbidden modules


def is_below(module: str, *folders: str) -> bool:
    """Tells whether `module` is one of these, or inside one: named relative to the package."""
    return any(
        module == f"{PACKAGE}.{folder}" or module.startswith(f"{PACKAGE}.{folder}.")
        for folder in folders
    )


def is_foreign(module: str, *packages: str) -> bool:
    return module.split(".")[0] in packages


def rules_of(module: str) -> Iterator[Rule]:
    """Yields the rules for modules that this one must not reach, over any number of imports."""
    yield "SGLang is reached by HTTP alone", lambda name: is_foreign(name, "sglang")
    yield "the package does not use tools/", lambda name: is_foreign(name, "tools")
    place = module.removeprefix(f"{PACKAGE}.").split(".")[0]
    if place not in TORCH_USERS:
        yield (
            "only trainer/ and weights/ reach torch",
            lambda name: is_foreign(name, *TORCH_PACKAGES),
        )
    if place in PROCESSES:
        others = PROCESSES - {place}
        yield "processes share messages only", lambda name: is_below(name, *others)
        yield "a process uses no command", lambda name: is_below(name, *COMMANDS)
    if is_below(module, "controller.core"):
        yield "the core is synchronous", lambda name: is_foreign(name, "asyncio")
        yield "the core sends nothing", lambda name: is_below(name, *SOCKETS)


def forbidden_chains(graph: dict[str, set[str]], module: str) -> list[str]:
    found = []
    for reason, is_forbidden in rules_of(module):
        chain = shortest_chain(graph, module, is_forbidden)
        if chain:
            found.append(f"{' -> '.join(chain)}: {reason}")
    if not is_below(module, *SOCKETS):
        found += [
            f"{module} -> {name}: only the sockets of protocol/ import zmq"
            for name in sorted(graph[module])
            if is_foreign(name, "zmq")
        ]
    return found


@pytest.mark.parametrize("module", sorted(package_modules()))
def test_module_reaches_only_what_its_folder_allows(module: str) -> None:
    assert forbidden_chains(import_graph(type_only=False), module) == []


def test_modules_form_no_import_circle() -> None:
    """Imports for type checkers alone count too."""
    circles = import_circles(import_graph(type_only=True))
    assert [" -> ".join(circle) for circle in circles] == []


def test_no_folder_has_too_many_files() -> None:
    files = [path for path in source_files(PACKAGE) if path.name != "__init__.py"]
    counts = {relative_path(path.parent): 0 for path in files}
    for path in files:
        counts[relative_path(path.parent)] += 1
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


@pytest.mark.parametrize("path", source_files("tests"), ids=relative_path)
def test_test_code_imports_no_test_module(path: Path) -> None:
    """Programs inside strings count too; shared code is in tests/support/."""
    found = re.findall(r"^\s*(?:from|import) +test_\w+.*", path.read_text(), re.MULTILINE)
    assert found == []


def test_lines_fit_into_the_columns() -> None:
    lines = [line for path in source_files(PACKAGE) for line in path.read_text().splitlines()]
    num_long = sum(len(line) > MAX_COLUMNS for line in lines)
    assert num_long <= MAX_LONG_LINES * len(lines)


# ---- tests of the checks


@pytest.mark.parametrize(
    "chain",
    [
        "controller.core.core torch",
        "protocol.types torch.nn",
        "config.load protocol.types megatron.core",
        "rollout.worker weights.bucket torch",
        "data.dataset weights.load safetensors triton",
        "weights.publish sglang.srt",
        "rollout.engine_process zmq.asyncio",
        "reward.worker rollout.worker",
        "reward.worker controller",
        "reward.worker protocol.types observability.run_log rollout.worker",
        "controller.controller launcher.supervisor launcher.run",
        "node.node cli.doctor",
        "controller.core.leases controller.handlers asyncio",
        "controller.core.leases storage.files protocol.hub",
        "config.load tools.arithmetic",
    ],
)
def test_forbidden_chain_is_found(chain: str) -> None:
    folders = {relative_path(path.parent) for path in source_files(PACKAGE)}
    tops = {folder.split("/")[1] for folder in folders if "/" in folder}
    names = [f"{PACKAGE}.{name}" if name.split(".")[0] in tops else name for name in chain.split()]
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, imported in itertools.pairwise(names):
        graph[name] = {imported}
    [found] = forbidden_chains(graph, names[0])
    assert found.startswith(" -> ".join(names))


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("trainer.step", "torch"),
        ("weights.reshard", "megatron.core"),
        ("protocol.hub", "zmq"),
        ("controller.handlers", "asyncio"),
        ("controller.core.core", f"{PACKAGE}.protocol.messages"),
        ("trainer.controller_client", f"{PACKAGE}.protocol.sync_link"),
        ("launcher.run", f"{PACKAGE}.cli.doctor"),
    ],
)
def test_allowed_import_is_not_reported(module: str, imported: str) -> None:
    graph = {f"{PACKAGE}.{module}": {imported}}
    assert forbidden_chains(graph, f"{PACKAGE}.{module}") == []


def test_circle_is_found_over_several_modules() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}
    [circle] = import_circles(graph)
    assert set(circle) == {"a", "b", "c"} and circle[0] == circle[-1]
