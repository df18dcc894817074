"""The package's import graph, read from the source without running it.

An edge leads from a module to everything that one of its import statements loads: the module
named, and the packages above it. Imports inside functions count like those at the top.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from paths import ROOT
from source_files import PACKAGE, source_files


def module_name(path: Path) -> str:
    """megatron_async_rl/protocol/wire.py -> megatron_async_rl.protocol.wire."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def package_modules() -> dict[str, Path]:
    """Returns every module of the package with its file."""
    return {module_name(path): path for path in source_files(PACKAGE)}


def import_nodes(tree: ast.AST, type_only: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yields all import statements; without `type_only` not those under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif (
            isinstance(node, ast.If)
            and ast.unparse(node.test).endswith("TYPE_CHECKING")
            and not type_only
        ):
            yield from import_nodes(ast.Module(node.orelse, []), type_only)
        else:
            yield from import_nodes(node, type_only)


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Returns the dotted names that a statement may load; `from a import b` gives `a` and `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "imports are absolute"
    return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]


def loaded_modules(names: Iterable[str], modules: Iterable[str]) -> set[str]:
    """Returns the modules that importing these names loads; foreign ones by the name given."""
    known, loaded = set(modules), set()
    for name in names:
        parts = name.split(".")
        if parts[0] != PACKAGE:
            loaded.add(name)
            continue
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        loaded |= {prefix for prefix in prefixes if prefix in known}
    return loaded


@cache
def import_graph(type_only: bool) -> dict[str, set[str]]:
    """Returns for each module those that its own statements load.

    Modules outside the package stand by the dotted names that the statements give. With
    `type_only`, imports under TYPE_CHECKING count too.
    """
    modules = package_modules()
    graph = {}
    for module, path in modules.items():
        nodes = import_nodes(ast.parse(path.read_text()), type_only)
        names = [name for node in nodes for name in imported_names(node)]
        graph[module] = loaded_modules(names, modules) - {module}
    return graph


def shortest_chain(
    graph: dict[str, set[str]], start: str, is_target: Callable[[str], bool]
) -> list[str]:
    """Returns the shortest chain of imports from `start` to a target; [] if none leads there."""
    came_from, queue = {start: ""}, deque([start])
    while queue:
        module = queue.popleft()
        for imported in sorted(graph.get(module, ())):
            if imported in came_from:
                continue
            came_from[imported] = module
            if is_target(imported):
                chain = [imported]
                while came_from[chain[-1]]:
                    chain.append(came_from[chain[-1]])
                return chain[::-1]
            queue.append(imported)
    return []


def import_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns the shortest circle through each import that lies on one; each circle once."""
    found: dict[frozenset[str], list[str]] = {}
    for module in sorted(graph):
        for imported in sorted(graph[module]):
            way_back = shortest_chain(graph, imported, lambda name, goal=module: name == goal)
            if way_back:
                found.setdefault(frozenset(way_back), [module, *way_back])
    return list(found.values())
