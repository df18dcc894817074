"""Every knob of a run: one YAML file, dotted `key=value` overrides after it, unknown keys refused.

Sections are frozen structs; the text under each field is its documentation, its range is checked,
and an error names the key, the value, the rule and what to do. Megatron's and SGLang's own knobs
keep their own names under `megatron:` and `sglang:` and pass through.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import yaml

from megatron_async_rl.config import documentation
from megatron_async_rl.config.checks import cross_check
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML reads `1e-3` as text, which no writer of a learning rate means."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.YAMLError(
                f"{key} stands twice in line {node.start_mark.line + 1} and below; keep one"
            )
    return loader.construct_mapping(node, deep=True)


_YamlLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_YamlLoader)


def load(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """The configuration in a YAML file, with dotted overrides such as `staleness.max_staleness=0`
    applied.

    Raises ConfigError: unreadable file, unknown key (names the nearest), wrong type or range.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"cannot read the configuration {path}: {e}; give the path of a YAML file"
        ) from e
    try:
        tree = _read_yaml(text) or {}
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not YAML: {e}") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(tree).__name__}")
    for override in overrides or []:
        _apply_override(tree, override)
    return from_tree(tree)


def from_tree(tree: dict[str, Any]) -> Config:
    """Checks a tree of plain values and makes the configuration of it."""
    _check_values(tree, "")
    try:
        config = msgspec.convert(tree, Config, strict=True)
    except msgspec.ValidationError as e:
        raise ConfigError(_explain(str(e), tree)) from None
    cross_check(config)
    return config


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back to an equal one."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"override {override!r} is not of the form key=value, such as staleness.max_staleness=0"
        )
    try:
        value = _read_yaml(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"the value of override {override!r} is not YAML: {e}") from e
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    node[last] = value


def _check_values(tree: dict[Any, Any], path: str) -> None:
    """What the sections' types do not say: keys are text, numbers are finite."""
    for key, value in tree.items():
        where = f"{path}.{key}".lstrip(".")
        if not isinstance(key, str):
            raise ConfigError(f"{where}: the key {key!r} is not text; write it in quotes")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where} = {value}: expected a finite number")
        if isinstance(value, dict):
            _check_values(value, where)


def _explain(message: str, tree: dict[str, Any]) -> str:
    """Turns msgspec's words into: key, value, rule, remedy."""
    match = re.fullmatch(r"(?P<rule>.*?)(?: - at `\$\.?(?P<path>.*?)`)?", message, re.S)
    rule, path = match["rule"], match["path"] or ""
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", rule)
    if unknown:
        names = [f.encode_name for f in msgspec.structs.fields(_section_at(path))]
        near = difflib.get_close_matches(unknown[1], names, n=1, cutoff=0.0)
        key = f"{path}.{unknown[1]}".lstrip(".")
        return f"{key} is not a setting; did you mean {'.'.join(filter(None, [path, near[0]]))}? Known here: {', '.join(names)}"
    missing = re.fullmatch(r"Object missing required field `(.*)`", rule)
    if missing:
        key = f"{path}.{missing[1]}".lstrip(".")
        return f"{key} is not set, and has no default. {_description(key)} Set it in the YAML or with {key}=VALUE"
    if "enum value" in rule:
        rule = f"expected one of {', '.join(map(repr, get_args(_annotation(path))))}"
    value: Any = tree
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return f"{path} = {value!r}: {rule[0].lower() + rule[1:]}. {_description(path)} Set it in the YAML or with {path}=VALUE"


def _section_at(path: str) -> type:
    section: type = Config
    for part in filter(None, path.split(".")):
        section = next(f.type for f in msgspec.structs.fields(section) if f.encode_name == part)
    return section


def _annotation(path: str) -> Any:
    *parents, last = path.split(".")
    return next(
        f.type
        for f in msgspec.structs.fields(_section_at(".".join(parents)))
        if f.encode_name == last
    )


def _description(path: str) -> str:
    """Returns the documentation of a setting; empty for a section."""
    *parents, last = path.split(".")
    try:
        return documentation.field_texts(_section_at(".".join(parents))).get(last, "")
    except (StopIteration, TypeError):
        return ""
