"""Loads a configuration: a YAML file, then dotted `key=value` overrides; unknown keys are rejected.

Errors name the setting, its value, the rule and the remedy (explain.py).
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import yaml

from megatron_async_rl.config.checks import cross_check
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.explain import explain
from megatron_async_rl.errors import ConfigError, DataError

_OLD_TAGS = ("int", "float", "timestamp")  # their YAML 1.1 forms are replaced below


class _YamlLoader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does and rejects duplicate keys.

    So `1e-3` is a number, `010` is ten, and `1:30` and `2024-01-31` are texts. `on`, `off`, `yes`
    and `no` stay true and false.
    """


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    lines: dict[str, int] = {}
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        line = key.start_mark.line + 1
        if first := lines.get(key.value):
            raise yaml.YAMLError(f"duplicate key {key.value} in lines {first} and {line}; keep one")
        lines[key.value] = line
    return loader.construct_mapping(node, deep=True)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    digits = text.lstrip("+-")
    return int(text, 10 if digits[:2].lower() not in ("0x", "0o", "0b") else 0)


_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag.rpartition(":")[2] not in _OLD_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_YamlLoader.add_constructor("tag:yaml.org,2002:int", _int)
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)$"),
    list("-+0123456789"),
)
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


class _YamlDumper(yaml.SafeDumper):
    """Quotes texts that `_YamlLoader`, or a reader of YAML 1.1, would take for another value."""


_YamlDumper.yaml_implicit_resolvers = {
    first: [*_YamlLoader.yaml_implicit_resolvers.get(first, []), *resolvers]
    for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
}


def _read_yaml(text: str) -> Any:
    """Returns the content. Raises ConfigError with the problem in one line."""
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.MarkedYAMLError as e:
        place, start = e.problem_mark or e.context_mark, e.context_mark
        where = f"line {place.line + 1}, column {place.column + 1}: " if place else ""
        problem = e.problem or e.context or ""
        if "'\\t'" in problem:
            problem = "a tab, where YAML takes spaces only"
        elif start and place and start.line != place.line:
            problem += f", {e.context} that begins in line {start.line + 1}"
        raise ConfigError(f"{where}{problem}") from None
    except yaml.YAMLError as e:
        raise ConfigError(" ".join(str(e).split())) from None
    except (ValueError, KeyError, AttributeError, TypeError) as e:  # such as of `!!int text`
        raise ConfigError(f"expected a value that fits its tag: {e}") from None
    except RecursionError:
        raise ConfigError("brackets must not be nested so deeply") from None


def load(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """Returns the configuration of a YAML file with overrides such as `staleness.max_staleness=0`.

    Raises ConfigError for an unreadable file, an unknown key, or a wrong type, value or
    combination.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"cannot read the configuration {path}: {e}", "give the path of a YAML file"
        ) from e
    try:
        tree = _read_yaml(text)
    except ConfigError as e:
        raise ConfigError(f"{path} is not YAML: {e}", "correct the file") from None
    if tree is None:
        raise ConfigError(f"{path} is empty", "write the settings of a run, see configs/")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(tree).__name__}")
    for override in overrides or []:
        _apply_override(tree, override)
    return from_tree(tree)


def load_run(run_dir: Path) -> Config:
    """Returns the configuration with which a run was last started. Raises DataError."""
    path = run_dir / "config.yaml"
    try:
        return load(path)
    except ConfigError as e:
        raise DataError(
            f"{path} cannot be used: {e}; lost: the settings of the run",
            "restore it from a copy, or start over with --from-scratch, which keeps the folder "
            "under another name",
        ) from None


def from_tree(tree: dict[str, Any]) -> Config:
    """Returns the configuration in a tree of plain values. Raises ConfigError."""
    _check_values(tree, "")
    try:
        config = msgspec.convert(tree, Config, strict=True)
    except msgspec.ValidationError as e:
        raise ConfigError(explain(str(e), tree)) from None
    cross_check(config)
    return config


def dump(config: Config) -> str:
    """Returns the resolved configuration as YAML; `load` reads an equal one from it."""
    return yaml.dump(msgspec.to_builtins(config), Dumper=_YamlDumper, sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"override {override!r} is not of the form key=value",
            "write it as staleness.max_staleness=0",
        )
    try:
        value = _read_yaml(text)
    except ConfigError as e:
        raise ConfigError(
            f"the value of override {override!r} is not YAML: {e}", "correct it, or quote it"
        ) from None
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(
                f"override {override!r}: {part} is a value, not a section",
                "name a setting of docs/configuration.md",
            )
    node[last] = value


def _check_values(tree: dict[Any, Any], path: str) -> None:
    """Checks rules that types cannot express: keys are text, values plain, numbers finite."""
    for key, value in tree.items():
        setting = f"{path}.{key}".lstrip(".")
        if not isinstance(key, str):
            raise ConfigError(f"{setting}: the key {key!r} is not text", "write it in quotes")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{setting} = {value}: expected a finite number")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise ConfigError(f"{setting} = {value}: expected a number of at most 64 bits")
        if not isinstance(value, str | int | float | list | tuple | dict | None):
            kind = type(value).__name__
            raise ConfigError(
                f"{setting} = {value!r}: a {kind} is not a value", "write it in quotes"
            )
        for node, name in [(value, setting), *_items(value, setting)]:
            if isinstance(node, dict):
                _check_values(node, name)


def _items(value: Any, setting: str) -> list[tuple[Any, str]]:
    """Returns the entries of a list with their names."""
    if not isinstance(value, list | tuple):
        return []
    return [(item, f"{setting}[{index}]") for index, item in enumerate(value)]
