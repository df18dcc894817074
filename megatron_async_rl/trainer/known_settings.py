"""`python -m megatron_async_rl.trainer.known_settings [CONFIG]`, for the checks before a run.

Prints the settings that `megatron:` may have, as JSON (installed.py). With CONFIG it makes
Megatron-Core's own configuration objects instead, which check the settings against each other.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from megatron_async_rl import patches, processes
from megatron_async_rl.config import load
from megatron_async_rl.config.passed_on import KnownSetting
from megatron_async_rl.model.config_json import HfConfig

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


def main(path: Path | None) -> None:
    patches.prepare_megatron()
    from megatron_async_rl.trainer.model import megatron_config

    if path:
        config = load.load(path)
        hf_config = HfConfig(config.model.path)
        shape = hf_config.shape(megatron_config.padded_vocab_multiple(config))
        megatron_config.transformer_config(config, shape, hf_config.architecture())
        megatron_config.ddp_config(config)
        megatron_config.schedule_arguments(config, megatron_config.optimizer_config(config))
        return
    settings = {}
    for cls in megatron_config.CLASSES:
        hints = get_type_hints(cls)
        settings |= {f.name: setting(hints[f.name]) for f in dataclasses.fields(cls)}
    sys.stdout.write(msgspec.json.encode(settings).decode() + "\n")


if __name__ == "__main__":
    processes.main(lambda: main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
