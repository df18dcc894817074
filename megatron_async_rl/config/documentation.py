"""Reads the documentation of settings; prints docs/configuration.md when run as a program."""

from __future__ import annotations

import ast
import inspect
import json
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.config.sections import Section

INTRODUCTION = """\
# Configuration

A run is described by one YAML file, such as [configs/quickstart.yaml](../configs/quickstart.yaml).
Settings can be overridden on the command line by their dotted name: `run CONFIG
staleness.max_staleness=0`. An unknown key, a wrong type or an impossible combination is rejected
before anything is started, with the setting, its value, the rule and the remedy. The resolved
configuration is kept as `config.yaml` in `run.dir`. Relative paths start at the folder in which the
command is typed; `~` and variables are not expanded.

`megatron` and `sglang` pass the settings of Megatron-Core and SGLang through under their own names.
`run` and `doctor` compare them with the installed versions before anything is started: unknown
names, abbreviations, wrong types, and keys that this package sets itself are rejected.

This page is generated: `python -m megatron_async_rl.config.documentation > docs/configuration.md`.
"""


@cache
def field_texts(section: type[Section]) -> dict[str, str]:
    """Returns the string literal below each field of a section, as one line."""
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    name = ""
    if (parent := section.__base__) is not Section:  # an evaluation set is a data source, and more
        texts |= field_texts(parent)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            texts[name] = " ".join(str(node.value.value).split())
            name = ""
        else:
            name = ""
    return texts


def markdown() -> str:
    """Returns docs/configuration.md."""
    return INTRODUCTION + "".join(_sections("", Config))


def _sections(path: str, section: type[Section]) -> Iterator[str]:
    fields = msgspec.structs.fields(section)
    settings = [field for field in fields if not _is_section(field.type)]
    if path:
        yield f"\n## `{path}`\n\n{inspect.getdoc(section)}\n"
        if settings:
            yield "\n| setting | type | default | meaning |\n|---|---|---|---|\n"
        texts = field_texts(section)
        for field in settings:
            cells = (field.name, _type(field.type), _default(field), texts[field.name])
            yield "| `{}` | {} | {} | {} |\n".format(*(cell.replace("|", "\\|") for cell in cells))
    for field in fields:
        name = f"{path}.{field.name}".lstrip(".")
        if _is_section(field.type):
            yield from _sections(name, field.type)
        elif item := item_section(field.type):
            is_named = typing.get_origin(field.type) is dict
            yield from _sections(f"{name}.NAME" if is_named else f"{name}[]", item)


def item_section(kind: Any) -> type[Section] | None:
    """Returns the section of the entries of a list or mapping; None for other types."""
    if _is_section(kind):
        return kind
    found = (item_section(argument) for argument in typing.get_args(kind))
    return next((item for item in found if item), None)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{json.dumps(field.default_factory())}`"
    return "required" if field.default is msgspec.NODEFAULT else f"`{json.dumps(field.default)}`"


def _type(kind: Any) -> str:
    """Returns a type as a reader of YAML knows it: `integer >= 1`, `"wait" or "drop"`, `number > 0
    or null`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        meta = arguments[1]
        limits = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        rules = [f"{s} {getattr(meta, n):.10g}" for n, s in limits if getattr(meta, n) is not None]
        return " ".join([_type(arguments[0]), ", ".join(rules)]).strip()
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict or _is_section(kind):
        return "mapping"
    if arguments:
        return " or ".join(_type(argument) for argument in arguments)
    return {int: "integer", float: "number", str: "text", bool: "boolean", type(None): "null"}[kind]


if __name__ == "__main__":
    print(markdown(), end="")
