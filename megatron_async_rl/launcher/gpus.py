"""Assigns this host's GPUs: first to the trainer's ranks, then to each server; none is shared."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Collection

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    As CUDA does, it ignores the first entry of that variable that is not a device, such as -1, and
    all later entries.
    """
    indices = _installed_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return indices or []
    names = [name.strip() for name in chosen.split(",")]
    return list(itertools.takewhile(lambda name: _is_device(name, indices), names))


def _is_device(name: str, indices: list[str] | None) -> bool:
    if name.isdigit():
        return indices is None or name in indices
    return name.startswith(("GPU-", "MIG-"))


def _installed_gpus() -> list[str] | None:
    """Returns the indices of the GPUs of this host; None without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.split() if done.returncode == 0 else None


def assign_gpus(config: Config, gpus: list[str], names: Collection[str]) -> dict[str, str]:
    """Returns CUDA_VISIBLE_DEVICES for each of `names` that needs a value.

    With sglang.device = cpu it is empty for all. Raises ConfigError if there are too few GPUs.
    """
    if config.on_cpu:
        return dict.fromkeys(names, "")
    trainers = [name for name in config.trainer_names if name in names and config.has_trainer]
    servers = [name for name in names if name.startswith("rollout-")]
    sizes = dict.fromkeys(trainers, config.ranks_per_host)
    sizes |= dict.fromkeys(servers, config.engine_tp)
    needed = sum(sizes.values())
    if len(gpus) < needed:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        variable = "" if chosen is None else f" (CUDA_VISIBLE_DEVICES = {chosen!r})"
        raise ConfigError(
            f"this run needs {needed} GPUs on this host, which has {len(gpus)}{variable}: "
            f"{config.ranks_per_host * len(trainers)} for trainer ranks, and {len(servers)} "
            f"servers (rollout.servers) of sglang.tp_size = {config.engine_tp}",
            "lower them, use more hosts (docs/slurm.md), or set sglang.device=cpu to run without "
            "GPUs",
        )
    assigned, first = {}, 0
    for name, size in sizes.items():
        assigned[name] = ",".join(gpus[first : first + size])
        first += size
    return assigned
