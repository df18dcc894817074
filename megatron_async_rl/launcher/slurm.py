"""`slurm`: one run over the nodes of a Slurm job, started as one task per node
(launchers/slurm.sbatch).

The first node decides which process runs where (placement.py), does the work of `run --elsewhere`,
and writes the other nodes' process names to a file beside run.dir; each of them does the work of
`join`. The name of the file has job, step and requeue count, so a file of an earlier attempt is
never read.

SIGTERM preempts all nodes; each task's exit code then asks to requeue the job (75). Slurm may send
it to every process of a node, repeatedly: processes.py defines which of them block it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
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
from megatron_async_rl.config.warnings import warnings
from megatron_async_rl.errors import ConfigError, DataError, Error, Preempted
from megatron_async_rl.launcher import gpus, placement
from megatron_async_rl.launcher import join as join_command
from megatron_async_rl.launcher import run as run_command
from megatron_async_rl.launcher.placement import Placement
from megatron_async_rl.launcher.session import show as show_line
from megatron_async_rl.model import memory
from megatron_async_rl.storage import files

LOOPBACK = "127.0.0.1"
POLL_S = 0.5
SCONTROL_TIMEOUT_S = 30.0
_USAGE = (
    "submit with sbatch launchers/slurm.sbatch CONFIG, or show the placement with --plan --nodes N "
    "--gpus-per-node G"
)


class NodeAssignments(msgspec.Struct, frozen=True):
    """The file that the first node writes for the others."""

    names: list[list[str]] = []  # process names, by node
    over: bool = False  # the run has ended, or could not start


@dataclass(frozen=True)
class Allocation:
    """The nodes of this job, and which of them this task runs on."""

    attempt: str  # job, step and requeue count: unique
    nodes: list[str]
    index: int
    gpus_per_node: int

    @classmethod
    def from_environment(cls) -> Allocation:
        """Raises ConfigError outside a step of a Slurm job with one task per node."""
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            raise ConfigError("SLURM_JOB_ID is not set: this is not a Slurm job", _USAGE)
        if "SLURM_STEP_ID" not in env:
            raise ConfigError(
                "SLURM_STEP_ID is not set: start `slurm` with srun, one task per node"
            )
        tasks, num_nodes = _count("SLURM_STEP_NUM_TASKS"), _count("SLURM_STEP_NUM_NODES")
        if tasks != num_nodes:
            raise ConfigError(
                f"{tasks} tasks on {num_nodes} nodes: expected one per node; use srun "
                "--ntasks-per-node=1"
            )
        nodes = _scontrol("show", "hostnames", _variable("SLURM_STEP_NODELIST")).split()
        if len(nodes) != num_nodes or (index := _count("SLURM_NODEID")) >= num_nodes:
            raise ConfigError(
                f"SLURM_STEP_NODELIST has {len(nodes)} nodes, SLURM_STEP_NUM_NODES = {num_nodes}, "
                f"SLURM_NODEID = {env.get('SLURM_NODEID')}: they do not belong to one step",
                _USAGE,
            )
        restarts = env.get("SLURM_RESTART_COUNT", "0")
        has_count = bool(env.get("SLURM_GPUS_ON_NODE"))
        return cls(
            attempt=f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{restarts}",
            nodes=nodes,
            index=index,
            gpus_per_node=(_count("SLURM_GPUS_ON_NODE") if has_count else len(gpus.visible_gpus())),
        )


def check_started_once() -> None:
    """Raises ConfigError if `run` is one of several tasks that srun started: each would start the
    whole run."""
    env = os.environ
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1") if "SLURM_STEP_ID" in env else "1"
    if tasks != "1" or env.get("SLURM_PROCID", "0") != "0":
        raise ConfigError(
            f"`run` is task {env.get('SLURM_PROCID')} of the {tasks} that srun started "
            "(SLURM_PROCID, SLURM_STEP_NUM_TASKS), and each would start the whole run",
            "start `slurm CONFIG` instead, one task per node (launchers/slurm.sbatch), or one "
            "`run` with srun --nodes=1 --ntasks=1",
        )


def idle_nodes_warning() -> str:
    """Returns a warning if `run` uses one of several nodes of a job, or ""."""
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if "SLURM_JOB_ID" not in os.environ or nodes == "1":
        return ""
    return (
        f"the job has {nodes} nodes (SLURM_JOB_NUM_NODES), and `run` uses this one only; submit "
        "launchers/slurm.sbatch to use all"
    )


def _variable(name: str) -> str:
    if value := os.environ.get(name):
        return value
    raise ConfigError(f"{name} is not set in this step of a Slurm job", _USAGE)


def _count(name: str) -> int:
    """Returns a number such as 8, or that of gpu:8 and gpu:h100:8(S:0-1)."""
    value = _variable(name)
    number = re.fullmatch(r"(?:[\w:-]+:)?(\d+)(?:\(.*\))?", value)
    if number is None:
        raise ConfigError(f"{name} = {value!r}: expected a number", "unset it, or correct it")
    return int(number[1])


def run(path: str, overrides: Sequence[str]) -> int:
    """Runs this node's part and returns the exit code. Raises Error if it cannot continue."""
    # outside of the launcher's own handler, before and after it
    previous = signal.signal(signal.SIGTERM, _preempted)
    try:
        allocation = Allocation.from_environment()
        config = configuration.load(path, list(overrides))
        run_dir = config.run_dir.resolve()
        assignments = run_dir.with_name(f".{run_dir.name}.job-{allocation.attempt}")
        if allocation.index == 0:
            return _first_node(allocation, assignments, path, list(overrides), config)
        return _other_node(allocation, assignments, config)
    except Preempted as e:
        sys.stderr.write(f"{e}\n")
        return processes.EXIT_REQUEUE
    finally:
        signal.signal(signal.SIGTERM, previous)


def show(
    path: str, overrides: Sequence[str], num_nodes: int | None, gpus_per_node: int | None
) -> int:
    """Prints the placement, warnings and the sbatch command."""
    if num_nodes is None or gpus_per_node is None:
        raise ConfigError(
            "--plan needs the size of the job, such as --nodes 4 --gpus-per-node 8", "give both"
        )
    config = configuration.load(path, list(overrides))
    console = Console()
    _print_placement(console, placement.assign_nodes(config, num_nodes, gpus_per_node))
    for line in [] if config.on_cpu else _memory(config):
        show_line(console, line)
    command = f"sbatch --nodes={num_nodes} --gpus-per-node={gpus_per_node} launchers/slurm.sbatch"
    show_line(console, f"\n{command} {shlex.join([path, *overrides])}")
    for warning in warnings(config):
        show_line(console, f"warning: {warning}")
    return 0


def _memory(config: Config) -> list[str]:
    try:
        return memory.summary(config)
    except DataError as e:
        return [f"GPU memory is not estimated: {e.problem}"]


def _first_node(
    allocation: Allocation, assignments: Path, path: str, overrides: list[str], config: Config
) -> int:
    def publish() -> None:
        name = glob.escape(config.run_dir.resolve().name)
        for old in assignments.parent.glob(f".{name}.job-*"):
            if old != assignments:
                old.unlink(missing_ok=True)  # of an earlier job: run.dir is locked by this one
        files.write_atomic(assignments, msgspec.json.encode(NodeAssignments(placed.names)))

    try:
        placed = placement.assign_nodes(config, len(allocation.nodes), allocation.gpus_per_node)
        if config.run.host == LOOPBACK and len(allocation.nodes) > 1:
            overrides = [*overrides, f"run.host={first_address(allocation.nodes)}"]
        config = configuration.load(path, [*overrides, f"trainer.hosts={placed.trainer_hosts}"])
        _print_placement(Console(), placed)
        return run_command.run(
            config, elsewhere=placed.elsewhere, on_owned=publish, ignore_more_sigterms=True
        )
    finally:
        with contextlib.suppress(OSError):  # an earlier error is the one to report
            files.write_atomic(assignments, msgspec.json.encode(NodeAssignments(over=True)))


def _other_node(allocation: Allocation, assignments: Path, config: Config) -> int:
    """Raises Error if the first node does not start this attempt in time."""
    limit_s = config.trainer.start_timeout_s
    deadline = time.monotonic() + limit_s
    first = allocation.nodes[0]
    while not (read := _read(assignments)).names:
        if read.over:
            sys.stderr.write(f"{first} did not start the run: see its output\n")
            return 0
        if time.monotonic() > deadline:
            raise Error(
                f"no assignment from the first node, {first}, within trainer.start_timeout_s = "
                f"{limit_s:.0f} s (no {assignments} can be read); see its output, and check that "
                f"all nodes share {assignments.parent}"
            )
        time.sleep(POLL_S)
    names = read.names[allocation.index]
    return join_command.join(config.run_dir, names, ignore_more_sigterms=True) if names else 0


def _read(assignments: Path) -> NodeAssignments:
    try:
        return msgspec.json.decode(assignments.read_bytes(), type=NodeAssignments)
    except OSError:  # not there, or an error of a network file system, which may pass
        return NodeAssignments()


def first_address(nodes: Sequence[str]) -> str:
    """Returns the first node's address on the route to the second; called on the first.

    Not the address of its own name, which /etc/hosts often maps to loopback.
    """
    return addresses.own_address(f"tcp://{_address_of(nodes[1])}:1")


def _address_of(node: str) -> str:
    try:
        return socket.gethostbyname(node)
    except OSError:  # a name that only Slurm knows
        fields = _scontrol("show", "node", node).split()
        values = dict(field.split("=", 1) for field in fields if "=" in field)
    try:
        return socket.gethostbyname(values["NodeAddr"])
    except (OSError, KeyError) as e:
        raise ConfigError(
            f"the address of node {node} was not found ({e}); set run.host to the first node's "
            "address"
        ) from None


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Error(f"{' '.join(command)}: {e}; scontrol must be on every node's PATH") from None
    if done.returncode:
        raise Error(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _print_placement(console: Console, placed: Placement) -> None:
    console.print(placed.table())
    for warning in placed.warnings():
        show_line(console, f"warning: {warning}")


def _preempted(number: int, _: object) -> NoReturn:
    raise Preempted("preempted before the run had started; run it again")
