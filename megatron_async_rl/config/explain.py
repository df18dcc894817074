"""Explains why a tree of settings is refused, for load.py.

Turns the message of msgspec, which converts the tree, into setting, value, rule, documentation and
remedy.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args, get_origin

import msgspec

from megatron_async_rl.config import documentation, passed_on
from megatron_async_rl.config.checks import check_set_name
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.datasets import EvaluationSet

_WORDS = {
    "object": "a mapping",
    "array": "a list",
    "str": "a text",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
}


def explain(message: str, tree: dict[str, Any]) -> str:
    """Returns the text for an error message of msgspec about a tree of settings.

    Raises ConfigError if the message is about an evaluation set of an impossible name.
    """
    message = _with_set_name(message, tree)
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
        if needed := _required(_annotation(key)):
            return f"{problem}. Write the section, with at least {', '.join(needed)}"
    else:
        key = path
        if "enum value" in rule:
            kind = _annotation(key)
            choices = get_args(get_args(kind)[0] if key.endswith("]") else kind)
            rule = f"expected one of {', '.join(map(repr, choices))}"
        value = _value_at(tree, key)
        problem = f"{key} = {value!r}: {_in_words(rule[0].lower() + rule[1:])}"
        if "expected a mapping" in problem and (section := _section_of(key)):
            if value is None:
                return f"{key} is empty: write its settings below it, indented, or remove the line"
            names = section.__struct_fields__
            first = next(iter(_required(section)), names[0])
            return f"{problem}. Write its settings below it, indented, such as `{first}: ...`"
    override = "" if "[" in key else f" or with {key}=VALUE"
    return f"{problem}. {_description(key)} Set it in the YAML{override}"


def _with_set_name(message: str, tree: dict[str, Any]) -> str:
    """Returns the error message with the key of the mapping that msgspec writes as [...]."""
    place = "$.evaluation.sets[...]"
    for name, entry in tree["evaluation"]["sets"].items() if place in message else ():
        try:
            msgspec.convert(entry, EvaluationSet, strict=True)
        except msgspec.ValidationError:
            check_set_name(name)  # a dot in it would be taken for one between settings
            return message.replace(place, f"$.evaluation.sets.{name}")
    return message


def _in_words(rule: str) -> str:
    """Returns a rule of msgspec with the types as a reader of YAML knows them."""
    return re.sub(
        r"`([a-z |]+)`",
        lambda match: " or ".join(_WORDS.get(name, name) for name in match[1].split(" | ")),
        rule,
    )


def _required(section: Any) -> list[str]:
    """Returns the settings of a section that have no default; none of another type."""
    fields = msgspec.structs.fields(section) if hasattr(section, "__struct_fields__") else ()
    return [field.encode_name for field in fields if field.required]


def _section_of(key: str) -> Any:
    """Returns the section of this name, or of an entry of this name; None for a setting."""
    try:
        found = _section_at(key)
    except (StopIteration, TypeError):
        return None
    return found if hasattr(found, "__struct_fields__") else None


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
