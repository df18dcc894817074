"""run.dir/hooks.json: which source files the user's hooks of a run had at its last start.

`run` records them and reports changes; each checkpoint's manifest has a copy.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from megatron_async_rl import hooks
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import DataError
from megatron_async_rl.storage import files

HOOKS_FILE = "hooks.json"


def record(run_dir: Path, config: Config) -> list[str]:
    """Keeps the digests of the configured hooks; returns the changes since the last start, as text.

    Raises ConfigError if the file of a hook is missing.
    """
    digests = hooks.digests(config)
    is_first = not (run_dir / HOOKS_FILE).exists()
    try:
        before, damage = read(run_dir), []
    except DataError as e:
        before, damage = {}, [f"{e.problem}; it is written again"]
    encoded = msgspec.json.format(msgspec.json.encode(digests))
    files.write_atomic(run_dir / HOOKS_FILE, encoded)
    if is_first or damage:
        return damage
    return [
        f"{setting} is another function than at the last start of this run: was "
        f"{before.get(setting, 'built-in')}, is {digests.get(setting, 'built-in')}"
        for setting in sorted({*before, *digests})
        if before.get(setting) != digests.get(setting)
    ]


def read(run_dir: Path) -> dict[str, str]:
    """Returns setting -> `package.module:name sha256:...`, empty if nothing was recorded.

    Raises DataError if the file is damaged.
    """
    lost = "the functions of the last start, with which those of this one are compared"
    return files.read_digests(run_dir / HOOKS_FILE, lost, "delete it to continue")
