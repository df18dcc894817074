"""Who may import whom, and what is written nowhere: held by reading the source, not by running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from source_files import PACKAGE, relative_path, source_files

PROCESSES = {"controller", "rollout", "reward", "trainer", "recorder", "node"}
HEAVY = {"trainer", "weights"}  # the folders that may import torch and Megatron
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_NAMES = {  # of modules that are fine otherwise: never imported bare, so that calls of them can be seen
    "yaml": {"load", "load_all", "unsafe_load", "full_load"},
    "torch": {"load"},
    "numpy": {"load"},
    "os": {"system", "popen"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "builtins": {"eval", "exec", "compile"},
}
YAML_LOADER = f"{PACKAGE}/config/load.py"  # holds the one SafeLoader subclass
ZYGOTE = f"{PACKAGE}/sandbox/zygote.py"  # runs programs: its jail is what test_sandbox.py is about


GET_OUTPUT = {"subprocess.getoutput", "subprocess.getstatusoutput"}  # a shell each
BUILTINS = {"builtins.eval", "builtins.exec"}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_violations(path: str, tree: ast.AST) -> list[str]:
    """What a module of the package imports although its place forbids it; `path` is relative to the repository."""
    place = Path(path).parts[1] if len(Path(path).parts) > 2 else ""
    found = []
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] in {"torch", "megatron", "transformer_engine", "apex"} and place not in HEAVY:
            found.append(f"{path} imports {name}: only trainer/ and weights/ may")
        if parts[0] == "sglang":
            found.append(f"{path} imports {name}: SGLang is reached by HTTP alone")
        if parts[0] == "zmq" and path != f"{PACKAGE}/protocol/transport.py":
            found.append(f"{path} imports {name}: only transport.py may")
        if parts[0] == "tools":
            found.append(f"{path} imports {name}: nothing imports tools/")
        if (
            parts[0] == PACKAGE
            and place in PROCESSES
            and len(parts) > 1
            and parts[1] in PROCESSES - {place}
        ):
            found.append(f"{path} imports {name}: processes meet in messages.py")
    return found


def safety_violations(path: str, tree: ast.AST) -> list[str]:
    """Ways to run what came by wire or file as code."""
    found = [
        f"{path} imports {name}" for name in imported(tree) if name.split(".")[0] in UNSAFE_MODULES
    ]
    found += [
        f"{path} imports {module}.{name} bare"
        for module, names in UNSAFE_NAMES.items()
        for name in names & bare_names(tree, module)
    ]
    modules = {alias.asname: alias.name for alias in imports(tree) if alias.asname}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, line = ast.unparse(call.func), call.lineno
        owner, _, attribute = name.rpartition(".")
        name = (
            f"{modules.get(owner, owner)}.{attribute}" if owner else name
        )  # `import torch as t` hides nothing
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        banned = {"eval", "exec", "__import__", "os.system", "os.popen"} | GET_OUTPUT | BUILTINS
        if name in banned and (path, name) != (ZYGOTE, "exec"):
            found.append(f"{path}:{line} calls {name}")
        if name.endswith((".recv_pyobj", ".send_pyobj")):
            found.append(f"{path}:{line} calls {name}: pickle on a socket")
        if (
            name in {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}
            and path != YAML_LOADER
        ):
            found.append(f"{path}:{line} calls {name}; use yaml.safe_load")
        if name == "torch.load" and not is_true(keywords.get("weights_only")):
            found.append(f"{path}:{line} calls torch.load without weights_only=True")
        if "shell" in keywords and not is_false(keywords["shell"]):
            found.append(f"{path}:{line} passes shell=")
        if is_true(keywords.get("allow_pickle")):
            found.append(f"{path}:{line} passes allow_pickle=True")
    return found


def imports(tree: ast.AST) -> list[ast.alias]:
    return [
        alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    ]


def bare_names(tree: ast.AST, module: str) -> set[str]:
    nodes = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == module
    )
    return {alias.name for node in nodes for alias in node.names}


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", source_files(PACKAGE), ids=relative_path)
def test_a_module_imports_only_what_its_place_allows(path: Path) -> None:
    assert import_violations(relative_path(path), ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", source_files(PACKAGE, "tools", "tests"), ids=relative_path)
def test_nothing_unpickles_evaluates_or_starts_a_shell(path: Path) -> None:
    assert safety_violations(relative_path(path), ast.parse(path.read_text())) == []


def test_the_only_yaml_load_uses_a_safe_loader() -> None:
    tree = ast.parse((ROOT / YAML_LOADER).read_text())
    loads = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "yaml.load"
    ]
    loaders = [
        ast.unparse(keyword.value)
        for call in loads
        for keyword in call.keywords
        if keyword.arg == "Loader"
    ]
    bases = {
        node.name: [ast.unparse(base) for base in node.bases]
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert len(loads) == len(loaders) == 1
    assert bases[loaders[0]] == ["yaml.SafeLoader"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_async_rl/controller/core/core.py", "import torch"),
        ("megatron_async_rl/protocol/types.py", "def f():\n    from torch import nn"),
        ("megatron_async_rl/rollout/worker.py", "from megatron.core import parallel_state"),
        ("megatron_async_rl/weights/publish.py", "import sglang.srt"),
        ("megatron_async_rl/rollout/engine_process.py", "import zmq.asyncio"),
        ("megatron_async_rl/reward/worker.py", "from megatron_async_rl.rollout import server"),
        ("megatron_async_rl/reward/worker.py", "from megatron_async_rl import controller"),
        ("megatron_async_rl/config/load.py", "import tools.arithmetic"),
    ],
)
def test_a_forbidden_import_is_seen(path: str, source: str) -> None:
    assert import_violations(path, ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "import pickle as p",
        "def f():\n    import dill",
        "socket.recv_pyobj()",
        "self._socket.send_pyobj(x)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "import yaml as y\ny.load(text, Loader=y.FullLoader)",
        "from yaml import load\nload(text)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "torch.load(path, weights_only=flag)",
        "import builtins\nbuiltins.eval(text)",
        "from os import system",
        "os.popen(command)",
        "subprocess.getoutput(command)",
        "subprocess.run(command, shell=flag)",
        "subprocess.Popen(command, shell=1)",
        "__import__('pickle')",
        "yaml.load(text, Loader=yaml.Loader)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(command, shell=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_an_unsafe_call_is_seen(source: str) -> None:
    assert safety_violations("megatron_async_rl/protocol/types.py", ast.parse(source))


@pytest.mark.parametrize(
    "source", ["model.eval()", "torch.load(path, weights_only=True)", "run(command, shell=False)"]
)
def test_a_safe_call_is_let_through(source: str) -> None:
    assert safety_violations("megatron_async_rl/protocol/types.py", ast.parse(source)) == []
