"""`python -m megatron_async_rl.trainer.known_settings`: prints the settings that `megatron:` may
have, as JSON, for the checks before a run (installed.py)."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from megatron_async_rl import patches
from megatron_async_rl.config.passed_on import KnownSetting

_NAMES = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "dict"}


def setting(hint: Any) -> KnownSetting:
    """Returns the types and choices of an annotation; none if the trainer does not convert it."""
    names: list[str] = []
    choices: list[Any] = []
    for part in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if part is type(None):
            names.append("null")
        elif get_origin(part) is Literal:
            choices += get_args(part)
        elif (kind := get_origin(part) or part) in _NAMES:
            names.append(_NAMES[kind])
        else:
            return KnownSetting()
    return KnownSetting(choices=choices) if choices else KnownSetting(names)


def main() -> None:
    patches.prepare_megatron()
    from megatron_async_rl.trainer.model.megatron_config import CLASSES

    settings = {}
    for cls in CLASSES:
        hints = get_type_hints(cls)
        settings |= {f.name: setting(hints[f.name]) for f in dataclasses.fields(cls)}
    sys.stdout.write(msgspec.json.encode(settings).decode() + "\n")


if __name__ == "__main__":
    main()
