"""`slurm`: one run over the nodes of a Slurm job, started as one task a node
(launchers/slurm.sbatch).

The first node decides what runs where (placement.py), does what `run --elsewhere` does, and tells
the others their names in a file beside run.dir; the others do what `join` does. The file bears the
job, its step and its requeue in its name: what an earlier life of the job left behind tells nobody
anything.

SIGTERM ends all of it in order, and each task's exit code asks for the job to be requeued (75).
Slurm may send it to every process of a node at once, and more than once: processes.py says who is
deaf to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec
from rich.console import Console

from megatron_async_rl import addresses, processes
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError, Error, Preempted
from megatron_async_rl.launcher import gpus, placement
from megatron_async_rl.launcher import join as joining
from megatron_async_rl.launcher import run as launch
from megatron_async_rl.launcher.placement import Placement
from megatron_async_rl.storage import files

LOOPBACK = "127.0.0.1"
POLL_S = 0.5
SCONTROL_S = 30.0
_ASK = "see the placement with --plan --nodes N --gpus-per-node G, and submit with sbatch launchers/slurm.sbatch CONFIG"


class Word(msgspec.Struct, frozen=True):
    """What the first node tells the others."""

    names: list[list[str]] = []  # by node
    over: bool = False  # the run has ended, or could not begin


@dataclass(frozen=True)
class Allocation:
    """This task's place in its job."""

    life: str  # of the job, its step, and how often it was requeued: never the same twice
    nodes: list[str]
    index: int
    gpus_per_node: int

    @classmethod
    def here(cls) -> Allocation:
        """Raises ConfigError outside a step of a Slurm job with one task a node."""
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            raise ConfigError(f"SLURM_JOB_ID is not set: this is no Slurm job; {_ASK}")
        if "SLURM_STEP_ID" not in env:
            raise ConfigError("SLURM_STEP_ID is not set: start `slurm` with srun, one task a node")
        tasks, num_nodes = env["SLURM_STEP_NUM_TASKS"], env["SLURM_STEP_NUM_NODES"]
        if tasks != num_nodes:
            raise ConfigError(
                f"{tasks} tasks on {num_nodes} nodes: expected one a node; srun --ntasks-per-node=1"
            )
        life = f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{env.get('SLURM_RESTART_COUNT', '0')}"
        num_gpus = (
            int(env["SLURM_GPUS_ON_NODE"])
            if "SLURM_GPUS_ON_NODE" in env
            else len(gpus.visible_gpus())
        )
        nodes = _scontrol("show", "hostnames", env["SLURM_STEP_NODELIST"]).split()
        return cls(life, nodes, int(env["SLURM_NODEID"]), num_gpus)


def run(path: str, overrides: Sequence[str]) -> int:
    """This node's part of the run. Returns the exit code. Raises Error when it cannot go on."""
    before = signal.signal(
        signal.SIGTERM, _preempted
    )  # until the launcher has its own handler, and after
    try:
        here = Allocation.here()
        config = configuration.load(path, list(overrides))
        word = config.run_dir.resolve().with_name(
            f".{config.run_dir.resolve().name}.job-{here.life}"
        )
        if here.index == 0:
            return _first(here, word, path, list(overrides), config)
        return _other(here, word, config)
    except Preempted as e:
        sys.stderr.write(f"{e}\n")
        return processes.EXIT_REQUEUE
    finally:
        signal.signal(signal.SIGTERM, before)


def show(
    path: str, overrides: Sequence[str], num_nodes: int | None, gpus_per_node: int | None
) -> int:
    """Prints what would run where."""
    if num_nodes is None or gpus_per_node is None:
        raise ConfigError("--plan needs the size of the job, such as --nodes 4 --gpus-per-node 8")
    plan = placement.place(configuration.load(path, list(overrides)), num_nodes, gpus_per_node)
    console = Console()
    console.print(plan.table())
    _tell(console, plan)
    settings = " ".join(overrides)
    command = f"sbatch --nodes={num_nodes} --gpus-per-node={gpus_per_node} launchers/slurm.sbatch {path} {settings}"
    console.print(f"\n{command.strip()}", soft_wrap=True, markup=False, highlight=False)
    return 0


def _first(here: Allocation, word: Path, path: str, overrides: list[str], config: Config) -> int:
    try:
        plan = placement.place(config, len(here.nodes), here.gpus_per_node)
        if config.run.host == LOOPBACK and len(here.nodes) > 1:
            overrides = [*overrides, f"run.host={first_address(here.nodes)}"]
        config = configuration.load(path, [*overrides, f"trainer.hosts={plan.trainer_hosts}"])
        console = Console()
        console.print(plan.table())
        _tell(console, plan)

        def begun() -> None:
            for old in set(word.parent.glob(f".{config.run_dir.resolve().name}.job-*")) - {word}:
                old.unlink(missing_ok=True)  # of earlier jobs: run.dir is ours now
            files.write(word, msgspec.json.encode(Word(plan.names)))

        return launch.run(config, elsewhere=plan.elsewhere, begun=begun, patient=True)
    finally:
        with contextlib.suppress(OSError):  # what went wrong before is the error to see
            files.write(word, msgspec.json.encode(Word(over=True)))


def _other(here: Allocation, word: Path, config: Config) -> int:
    """Raises Error when the run of this very job does not begin in time."""
    limit_s = config.trainer.start_timeout_s
    deadline = time.monotonic() + limit_s
    while not (said := _read(word)).names:
        if said.over:
            sys.stderr.write(f"{here.nodes[0]} has nothing for this node to do: see what it says\n")
            return 0
        if time.monotonic() > deadline:
            raise Error(
                f"no word of the run from the first node, {here.nodes[0]}, within trainer.start_timeout_s = {limit_s:.0f} s "
                f"({word} is not there); see what it says, and whether {word.parent} is a folder that all nodes share"
            )
        time.sleep(POLL_S)
    names = said.names[here.index]
    return joining.join(config.run_dir, names, patient=True) if names else 0


def _read(word: Path) -> Word:
    try:
        return msgspec.json.decode(word.read_bytes(), type=Word)
    except FileNotFoundError:
        return Word()


def first_address(nodes: Sequence[str]) -> str:
    """The first node's address as the second reaches it; asked on the first.

    Not the address of its own name, which many a /etc/hosts gives as a loopback one.
    """
    return addresses.own_address(f"tcp://{_address_of(nodes[1])}:1")


def _address_of(node: str) -> str:
    try:
        return socket.gethostbyname(node)
    except OSError:  # a name that Slurm alone knows
        words = dict(
            word.split("=", 1) for word in _scontrol("show", "node", node).split() if "=" in word
        )
    try:
        return socket.gethostbyname(words["NodeAddr"])
    except (OSError, KeyError) as e:
        raise ConfigError(
            f"the address of node {node} is not to be found ({e}); set run.host to the first node's address"
        ) from None


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["scontrol", *arguments],
            capture_output=True,
            text=True,
            timeout=SCONTROL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Error(
            f"scontrol {' '.join(arguments)}: {e}; it must be on the PATH of every node"
        ) from None
    if done.returncode:
        raise Error(f"scontrol {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _tell(console: Console, plan: Placement) -> None:
    for warning in plan.warnings():
        console.print(f"warning: {warning}", soft_wrap=True, markup=False, highlight=False)


def _preempted(number: int, _: object) -> NoReturn:
    raise Preempted("told to end before the run was on; it goes on when run again")
