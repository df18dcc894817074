"""No file or message becomes running code: pickle, eval, shells and unsafe loaders are banned.

The rules are checked on the source of the package, the tools and the tests.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from import_graph import import_nodes, imported_names
from paths import ROOT
from source_files import PACKAGE, relative_path, source_files

UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
# Never imported bare: a call through its module is recognized below.
UNSAFE_NAMES = {
    "yaml": {"load", "load_all", "unsafe_load", "full_load"},
    "torch": {"load"},
    "numpy": {"load"},
    "os": {"system", "popen"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "builtins": {"eval", "exec", "compile"},
}
YAML_LOADER = f"{PACKAGE}/config/load.py"  # holds the one SafeLoader subclass
SANDBOXED = (
    f"{PACKAGE}/sandbox/program.py"  # executes programs inside the jail that test_sandbox.py tests
)
BANNED_CALLS = {"eval", "exec", "__import__", "builtins.eval", "builtins.exec"} | {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
UNSAFE_YAML = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}


def safety_violations(path: str, tree: ast.AST) -> list[str]:
    """Returns the places where data from a file or a message could run as code."""
    nodes = list(import_nodes(tree))
    found = [
        f"{path} imports {name}"
        for node in nodes
        for name in imported_names(node)
        if name.split(".")[0] in UNSAFE_MODULES
    ]
    found += [
        f"{path} imports {node.module}.{alias.name} bare"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in UNSAFE_NAMES.get(node.module or "", ())
    ]
    # so that `import torch as t` hides nothing
    aliases = {
        alias.asname: alias.name
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.asname
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, line = ast.unparse(call.func), call.lineno
        owner, _, attribute = name.rpartition(".")
        name = f"{aliases.get(owner, owner)}.{attribute}" if owner else name
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in BANNED_CALLS and (path, name) != (SANDBOXED, "exec"):
            found.append(f"{path}:{line} calls {name}")
        if name.endswith((".recv_pyobj", ".send_pyobj")):
            found.append(f"{path}:{line} calls {name}: pickle on a socket")
        if name in UNSAFE_YAML and path != YAML_LOADER:
            found.append(f"{path}:{line} calls {name}; use yaml.safe_load")
        if name == "torch.load" and not is_true(keywords.get("weights_only")):
            found.append(f"{path}:{line} calls torch.load without weights_only=True")
        if "shell" in keywords and not is_false(keywords["shell"]):
            found.append(f"{path}:{line} passes shell=")
        if is_true(keywords.get("allow_pickle")):
            found.append(f"{path}:{line} passes allow_pickle=True")
    return found


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", source_files(PACKAGE, "tools", "tests"), ids=relative_path)
def test_source_does_not_unpickle_evaluate_or_start_a_shell(path: Path) -> None:
    assert safety_violations(relative_path(path), ast.parse(path.read_text())) == []


def test_only_yaml_load_uses_a_safe_loader() -> None:
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
def test_unsafe_call_is_found(source: str) -> None:
    assert safety_violations("megatron_async_rl/protocol/types.py", ast.parse(source))


@pytest.mark.parametrize(
    "source", ["model.eval()", "torch.load(path, weights_only=True)", "run(command, shell=False)"]
)
def test_safe_call_is_allowed(source: str) -> None:
    assert safety_violations("megatron_async_rl/protocol/types.py", ast.parse(source)) == []
