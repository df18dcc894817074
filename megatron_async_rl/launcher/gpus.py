"""Which GPUs of this host each process sees: the trainer's ranks first, those of this host, then each server's, none shared."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names CUDA_VISIBLE_DEVICES takes; empty on a host without any."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return listed.stdout.split() if listed.returncode == 0 else []


def assign_gpus(
    config: Config, gpus: list[str], here: Collection[str] | None = None
) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES by process name. Raises ConfigError when there are too few for trainer
    and servers.

    `here`: the processes that this host starts, when not all. `sglang.device: cpu` says that
    nothing of the run uses a GPU.
    """
    chosen = (
        [*config.trainer_names, *(f"rollout-{i}" for i in range(config.rollout.servers))]
        if here is None
        else here
    )
    servers = [name for name in chosen if name.startswith("rollout-")]
    if config.on_cpu:
        return dict.fromkeys(chosen, "")
    per_server = config.engine_tp
    trainers = [name for name in config.trainer_names if name in chosen and config.has_trainer]
    trainer_ranks = config.ranks_per_host * len(trainers)
    needed = trainer_ranks + per_server * len(servers)
    if len(gpus) < needed:
        raise ConfigError(
            f"this run needs {needed} GPUs: {trainer_ranks} trainer ranks, and rollout.servers = {len(servers)} times "
            f"sglang.tp_size = {per_server}; this host has {len(gpus)}. Lower them, or set sglang.device=cpu for a laptop"
        )
    each = config.ranks_per_host
    shares = {name: gpus[index * each : (index + 1) * each] for index, name in enumerate(trainers)}
    for index, server in enumerate(servers):
        first = trainer_ranks + index * per_server
        shares[server] = gpus[first : first + per_server]
    return {name: ",".join(share) for name, share in shares.items()}
