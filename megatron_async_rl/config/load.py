"""Loads a configuration: a YAML file, then dotted `key=value` overrides; unknown keys are rejected.

Errors name the setting, its value, the rule and the remedy, and quote the setting's documentation.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import yaml

from megatron_async_rl.config import documentation, passed_on
from megatron_async_rl.config.checks import cross_check
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.datasets import EvaluationSet
from megatron_async_rl.errors import ConfigError, DataError

_OLD_TAGS = ("int", "float", "timestamp")  # whose YAML 1.1 forms are replaced below


class _YamlLoader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does and rejects duplicate keys.

    So `1e-3` is a number, `010` is ten, and `1:30` and `2024-01-31` are texts. `on`, `off`, `yes`
    and `no` stay true and false.
    """


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.YAMLError(
                f"duplicate key {key} in the mapping of line {node.start_mark.line + 1}; keep one"
            )
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
        place = e.problem_mark or e.context_mark
        where = f"line {place.line + 1}, column {place.column + 1}: " if place else ""
        raise ConfigError(f"{where}{e.problem or e.context}") from None
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
        raise ConfigError(_explain(_with_set_name(str(e), tree), tree)) from None
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
            raise ConfigError(f"{setting} = {value!r}: a {kind} is no value", "write it in quotes")
        for node, name in [(value, setting), *_items(value, setting)]:
            if isinstance(node, dict):
                _check_values(node, name)


def _items(value: Any, setting: str) -> list[tuple[Any, str]]:
    """Returns the entries of a list with their names."""
    if not isinstance(value, list | tuple):
        return []
    return [(item, f"{setting}[{index}]") for index, item in enumerate(value)]


def _with_set_name(message: str, tree: dict[str, Any]) -> str:
    """Returns the error message with the key of the mapping that msgspec writes as [...]."""
    place = "$.evaluation.sets[...]"
    for name, entry in tree["evaluation"]["sets"].items() if place in message else ():
        try:
            msgspec.convert(entry, EvaluationSet, strict=True)
        except msgspec.ValidationError:
            return message.replace(place, f"$.evaluation.sets.{name}")
    return message


def _explain(message: str, tree: dict[str, Any]) -> str:
    """Turns an error message of msgspec into setting, value, rule, documentation and remedy."""
    match = re.fullmatch(r"(?P<rule>.*?)(?: - at `\$\.?(?P<path>.*?)`)?", message, re.S)
    assert match
    rule, path = match["rule"], (match["path"] or "").replace("[...]", "")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", rule):
        names = [field.encode_name for field in msgspec.structs.fields(_section_at(path))]
        nearest = difflib.get_close_matches(unknown[1], names, n=1, cutoff=0.0)[0]
        key, suggestion = (f"{path}.{name}".lstrip(".") for name in (unknown[1], nearest))
        suggestion = _place_of(unknown[1]) or suggestion
        known = ", ".join(names)
        return f"{key} is not a setting; did you mean {suggestion}? Known here: {known}"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", rule):
        key = f"{path}.{missing[1]}".lstrip(".")
        problem = f"{key} is not set, and has no default"
    else:
        key = path
        if "enum value" in rule:
            kind = _annotation(key)
            choices = get_args(get_args(kind)[0] if key.endswith("]") else kind)
            rule = f"expected one of {', '.join(map(repr, choices))}"
        problem = f"{key} = {_value_at(tree, key)!r}: {rule[0].lower() + rule[1:]}"
        if "expected `object`, got `null`" in problem:
            return f"{key} is empty: write its settings below it, indented, or remove the line"
    override = "" if "[" in key else f" or with {key}=VALUE"
    return f"{problem}. {_description(key)} Set it in the YAML{override}"


def _place_of(name: str) -> str:
    """Returns the setting of that meaning or name in another section, "" if there is none."""
    sections = (
        f"{section.encode_name}.{name}"
        for section in msgspec.structs.fields(Config)
        if name in getattr(section.type, "__struct_fields__", ())
    )
    return passed_on.elsewhere("megatron", name) or next(sections, "")


def _value_at(tree: Any, key: str) -> Any:
    value = tree
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(value, list):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _section_at(path: str) -> type:
    section: type = Config
    parts = iter(filter(None, path.split(".")))
    for part in parts:
        kind = _field_type(section, part)
        item = documentation.item_section(kind)
        is_mapping = get_origin(kind) is dict and item is not None
        if is_mapping:
            next(parts, None)  # the name of the entry
        section = (item if part.endswith("]") or is_mapping else None) or kind
    return section


def _annotation(key: str) -> Any:
    path, _, name = key.rpartition(".")
    return _field_type(_section_at(path), name)


def _field_type(section: type, name: str) -> Any:
    name = name.partition("[")[0]
    return next(f.type for f in msgspec.structs.fields(section) if f.encode_name == name)


def _description(key: str) -> str:
    """Returns the documentation of a setting; empty for a section."""
    path, _, name = key.rpartition(".")
    try:
        return documentation.field_texts(_section_at(path)).get(name.partition("[")[0], "")
    except (StopIteration, TypeError):
        return ""
