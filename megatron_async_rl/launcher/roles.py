"""The processes of a run by name, and the command that starts each: rollout-0, rollout-1, ..., reward-0, ..., trainer.

With trainer.hosts > 1 the trainer is trainer-0, trainer-1, ...: on each host a node (node/) that starts its ranks.
With run.mode = rollout_only the recorder is what bears the trainer's name.

Rollout and reward workers may have any number: one beyond rollout.servers is an additional server.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_async_rl import addresses
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.launcher import gpus

REPOSITORY = Path(__file__).resolve().parents[2]
_JOINING = re.compile(r"(rollout|reward)-\d+")


@dataclass(frozen=True)
class Command:
    arguments: list[str]
    env: dict[str, str]
    sigterm_blocked: bool = (
        False  # to SIGTERM: it is told to save by the controller, and stopped by SIGKILL
    )


def names(config: Config) -> list[str]:
    """All processes of a run, in the order in which they are started."""
    servers = [f"rollout-{i}" for i in range(config.rollout.servers)]
    return [
        "controller",
        *servers,
        *config.trainer_names,
        *(f"reward-{i}" for i in range(config.reward.workers)),
    ]


def check_joining(chosen: Collection[str], config: Config) -> None:
    """Raises ConfigError for a name that no process of another launcher can have."""
    trainers = config.trainer_names
    for name in chosen:
        if not _JOINING.fullmatch(name) and name not in trainers:
            several = f"; trainer.hosts = {config.trainer.hosts}" if config.has_trainer else ""
            raise ConfigError(
                f"{name!r} cannot be started apart from the controller; expected rollout-N, reward-N or "
                f"{' or '.join(trainers)}{several}"
            )


def commands(config: Config, run_dir: Path, chosen: Collection[str]) -> dict[str, Command]:
    """How to start each of these on this host. Raises ConfigError when it has too few GPUs for them."""
    assigned = gpus.assign_gpus(config, gpus.visible_gpus(), chosen)
    return {name: _command(name, config, str(run_dir), assigned.get(name)) for name in chosen}


def _command(name: str, config: Config, run_dir: str, gpu_ids: str | None) -> Command:
    role = name.split("-")[0]
    module = f"megatron_async_rl.{role}"
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if gpu_ids is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu_ids
    if role == "trainer" and not config.has_trainer:
        return Command(
            [sys.executable, "-m", "megatron_async_rl.recorder", run_dir], env, sigterm_blocked=True
        )
    env |= addresses.collective_environment(config.run.host)
    if role != "trainer":
        return Command(
            [sys.executable, "-m", module, run_dir, *([] if role == "controller" else [name])], env
        )
    env |= {
        "OMP_NUM_THREADS": str(config.trainer.cpu_threads),
        "NCCL_CUMEM_ENABLE": "0",  # as SGLang sets it
    }
    if len(config.trainer_names) > 1:
        return Command(
            [sys.executable, "-m", "megatron_async_rl.node", run_dir, name],
            env,
            sigterm_blocked=True,
        )
    rendezvous = (
        "--nnodes=1",
        "--rdzv-backend=file",
        f"--rdzv-endpoint={run_dir}/keys/rank-stores",
    )
    return Command(torchrun(config, run_dir, *rendezvous), env, sigterm_blocked=True)


def torchrun(config: Config, run_dir: str, *meeting: str) -> list[str]:
    """Starts this host's trainer ranks, which find the others as `meeting` says."""
    return [
        *(
            sys.executable,
            "-m",
            "megatron_async_rl.trainer.torchrun",
            *meeting,
            f"--nproc-per-node={config.ranks_per_host}",
        ),
        *("--no-python", sys.executable, "-m", "megatron_async_rl.trainer", run_dir),
    ]
