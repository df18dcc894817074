"""The settings that need a newer SGLang than the oldest supported one.

Checked before a run, by the installed version, and by each worker, by its server's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError

NEEDED = (0, 5, 21)


def parsed(version: str) -> tuple[int, ...]:
    """Returns the first three numbers of a version such as 0.5.21.post1 or 0.5.22rc1+cu129."""
    numbers = re.match(r"\d+(\.\d+){0,2}", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _demands(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yields the settings that need version NEEDED: setting, reason, remedy."""
    weights, instead = config.weights, "set weights.kv_cache=recompute weights.interrupt=abort"
    if weights.kv_cache == "keep":
        reason = "a token could be labelled with weights that did not sample it"
        yield "weights.kv_cache = keep", reason, instead
    elif weights.interrupt == "retract":
        reason = "it cannot drop prefixes of the old weights while requests are queued"
        yield "weights.interrupt = retract", reason, instead
    if config.sends_fp8:
        reason = "it receives tensors of one element type in a bucket"
        yield "weights.quantization = fp8_block", reason, "remove weights.quantization"


def check(config: Config, version: tuple[int, ...]) -> None:
    """Raises ConfigError for the first setting that this version of SGLang cannot carry out."""
    if version >= NEEDED:
        return
    for setting, reason, instead in _demands(config):
        needed, found = (".".join(map(str, numbers)) for numbers in (NEEDED, version))
        raise ConfigError(
            f"{setting} needs SGLang {needed} or newer, this is {found}: {reason}",
            f"install a newer one in the engine's environment (tools/setup_env.sh), or {instead}",
        )
