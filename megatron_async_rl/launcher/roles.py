"""The processes of a run by name, and the command that starts each.

    controller, rollout-0, rollout-1, ..., reward-0, ..., trainer

With trainer.hosts > 1 the trainer is trainer-0, trainer-1, ...: one node (node/) per host, which
starts its ranks. With run.mode = rollout_only `trainer` is the recorder. `join` may start rollout
and reward workers of any number: rollout-N with N >= rollout.servers is an additional server.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_async_rl import addresses, processes
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.launcher import gpus, torchrun

_WORKER = re.compile(r"(rollout|reward)-\d+")


@dataclass(frozen=True)
class Command:
    arguments: list[str]
    env: dict[str, str]
    sigterm_blocked: bool = False  # see processes.py


def names(config: Config) -> list[str]:
    """Returns all processes of a run, in the order in which they are started."""
    servers = [f"rollout-{i}" for i in range(config.rollout.servers)]
    reward_workers = [f"reward-{i}" for i in range(config.reward.workers)]
    return ["controller", *servers, *config.trainer_names, *reward_workers]


def check_joining(chosen: Collection[str], config: Config) -> None:
    """Raises ConfigError for a name that only the launcher of the controller may start."""
    for name in chosen:
        if not _WORKER.fullmatch(name) and name not in config.trainer_names:
            trainers = " or ".join(config.trainer_names)
            hosts = f"; trainer.hosts = {config.trainer.hosts}" if config.has_trainer else ""
            raise ConfigError(
                f"{name!r} cannot be started apart from the controller; expected rollout-N, "
                f"reward-N or {trainers}{hosts}"
            )


def commands(config: Config, run_dir: Path, chosen: Collection[str]) -> dict[str, Command]:
    """Returns how to start each process on this host. Raises ConfigError if it has too few GPUs."""
    assigned = gpus.assign_gpus(config, gpus.visible_gpus(), chosen)
    return {name: _command(name, config, run_dir, assigned.get(name)) for name in chosen}


def _command(name: str, config: Config, run_dir: Path, gpu_ids: str | None) -> Command:
    role = name.split("-")[0]
    env = {"PYTHONPATH": processes.python_path(), "PYTHONUNBUFFERED": "1"}
    if gpu_ids is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu_ids
    if role == "trainer" and not config.has_trainer:
        return Command(_python("recorder", run_dir), env, sigterm_blocked=True)
    env |= addresses.collective_environment(config.run.host)
    if role == "controller":
        return Command(_python(role, run_dir), env)
    if role != "trainer":
        return Command(_python(role, run_dir, name), env)
    # NCCL_CUMEM_ENABLE: as SGLang sets it
    env |= {"OMP_NUM_THREADS": str(config.trainer.cpu_threads), "NCCL_CUMEM_ENABLE": "0"}
    if len(config.trainer_names) > 1:
        return Command(_python("node", run_dir, name), env, sigterm_blocked=True)
    rendezvous = torchrun.file_rendezvous(run_dir / "keys" / "rank-stores")
    ranks, module = config.ranks_per_host, "megatron_async_rl.trainer"
    command = torchrun.command(ranks, rendezvous, module, str(run_dir))
    return Command(command, env, sigterm_blocked=True)


def _python(process: str, run_dir: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"megatron_async_rl.{process}", str(run_dir), *arguments]
