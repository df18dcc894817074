"""Assigns the processes of a run to the nodes of an allocation.

It needs only the configuration, the number of nodes and the GPUs of each, so `slurm --plan` works
on any machine.

    trainer hosts     the first nodes, one each, all with the same number of ranks
    SGLang servers    packed into the remaining GPUs, in order; a server never spans nodes
    the rest          on the first node: controller, reward workers, and the recorder if run.mode is
                      rollout_only

With sglang.device = cpu no process uses a GPU: servers go to the nodes in turn, first to those
without trainer ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec.structs import replace
from rich.table import Table

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """`names[n]` are the processes of node n; `gpus[n]` is how many of its GPUs they use."""

    trainer_hosts: int
    names: list[list[str]]
    gpus: list[int]
    gpus_per_node: int

    @property
    def elsewhere(self) -> list[str]:
        """The processes that are not on the first node."""
        return [name for names in self.names[1:] for name in names]

    def warnings(self) -> list[str]:
        """Returns one text each for unused nodes and idle GPUs."""
        texts = []
        if unused := [str(node) for node, names in enumerate(self.names) if not names]:
            needed = len(self.names) - len(unused)
            texts.append(f"no process runs on node {', '.join(unused)}: request {needed} nodes")
        idle = [self.gpus_per_node - used for used in self.gpus]
        if any(idle) and any(self.gpus):
            where = ", ".join(f"{count} of node {node}" for node, count in enumerate(idle) if count)
            total = len(self.gpus) * self.gpus_per_node
            texts.append(
                f"{sum(idle)} of {total} GPUs are idle: {where}; raise rollout.servers, or request "
                "fewer nodes"
            )
        return texts

    def table(self) -> Table:
        columns = ("node", "processes", "GPUs used")
        table = Table(*columns, box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for node, names in enumerate(self.names):
            used = f"{self.gpus[node]} of {self.gpus_per_node}"
            table.add_row(str(node), ", ".join(_merge_ranges(names)) or "-", used)
        return table


def assign_nodes(config: Config, num_nodes: int, gpus_per_node: int) -> Placement:
    """Raises ConfigError, with the sums and the remedy, if the run does not fit."""
    if num_nodes < 1:
        raise ConfigError(f"a run needs at least 1 node, not {num_nodes}", "give --nodes")
    hosts = config.trainer.hosts if config.has_trainer else 1
    if config.has_trainer and not config.on_cpu:
        hosts = trainer_hosts(config, gpus_per_node)
    config = replace(config, trainer=replace(config.trainer, hosts=hosts))
    per_host = config.ranks_per_host if config.has_trainer and not config.on_cpu else 0
    per_server = 0 if config.on_cpu else config.engine_tp
    _check_fit(config, per_host, num_nodes, gpus_per_node)

    names: list[list[str]] = [[] for _ in range(num_nodes)]
    gpus = [0] * num_nodes
    names[0].append("controller")
    for node, name in enumerate(config.trainer_names):
        names[node].append(name)
        gpus[node] += per_host
    for server in range(config.rollout.servers):
        free = (n for n in range(num_nodes) if gpus_per_node - gpus[n] >= per_server)
        node = (hosts + server) % num_nodes if config.on_cpu else next(free)
        names[node].append(f"rollout-{server}")
        gpus[node] += per_server
    names[0] += [f"reward-{number}" for number in range(config.reward.workers)]
    return Placement(hosts, names, gpus, gpus_per_node)


def trainer_hosts(config: Config, gpus_per_node: int) -> int:
    """Returns trainer.hosts, checked; if it is 1 (not set), the fewest nodes that hold the ranks.

    A tensor-parallel group communicates in every layer, over NVLink: it must not span nodes.
    """
    ranks, hosts = config.trainer_ranks, config.trainer.hosts
    tp = config.parallel_size("tensor_model")
    if tp > gpus_per_node:
        raise ConfigError(
            f"megatron.tensor_model_parallel_size = {tp} is more than the {gpus_per_node} GPUs of "
            "a node, and a tensor-parallel group must not span nodes; set it to at most "
            f"{gpus_per_node}, or request nodes with more GPUs"
        )
    fitting = [
        n
        for n in range(1, ranks + 1)
        if ranks % n == 0 and ranks // n <= gpus_per_node and ranks // n % tp == 0
    ]
    if hosts == 1:
        return fitting[0]  # never empty: each tensor-parallel group fits on a node
    if hosts in fitting:
        return hosts
    per_host = ranks // hosts
    if per_host > gpus_per_node:
        rule = f"but a node has {gpus_per_node} GPUs"
    else:
        rule = f"which splits a group of megatron.tensor_model_parallel_size = {tp}"
    raise ConfigError(
        f"trainer.hosts = {hosts} puts {ranks} / {hosts} = {per_host} ranks on a node, {rule}; set "
        f"it to one of {', '.join(map(str, fitting))}, or leave it out to use {fitting[0]}"
    )


def _check_fit(config: Config, per_host: int, num_nodes: int, gpus_per_node: int) -> None:
    """Raises ConfigError; `per_host`: GPUs of each trainer host."""
    hosts, servers, per_server = config.trainer.hosts, config.rollout.servers, config.engine_tp
    if config.on_cpu:
        if num_nodes < hosts:
            raise ConfigError(
                f"trainer.hosts = {hosts} is more than the {num_nodes} nodes; request {hosts} "
                "nodes, or lower it"
            )
        return
    if per_server > gpus_per_node:
        raise ConfigError(
            f"sglang.tp_size = {per_server} is more than the {gpus_per_node} GPUs of a node, and a "
            f"server must not span nodes; set it to at most {gpus_per_node}, or request nodes with "
            "more GPUs"
        )
    beside_trainers = hosts * ((gpus_per_node - per_host) // per_server)
    per_node = gpus_per_node // per_server
    needed = hosts + -(-max(0, servers - beside_trainers) // per_node)
    if num_nodes >= needed:
        return
    parts = [f"{hosts} nodes with {per_host} trainer ranks each"] if per_host else []
    parts.append(f"rollout.servers = {servers} of sglang.tp_size = {per_server}")
    remedy = f"request {needed} nodes (--nodes={needed})"
    room = beside_trainers + (num_nodes - hosts) * per_node
    if num_nodes >= hosts and room > 0:
        remedy += f", or set rollout.servers to at most {room}"
    raise ConfigError(
        f"{' and '.join(parts)} do not fit on {num_nodes} nodes of {gpus_per_node} GPUs; {remedy}"
    )


def _merge_ranges(names: Sequence[str]) -> Iterator[str]:
    """Writes rollout-0, rollout-1, rollout-2 as rollout-0..2."""

    def run_of(place: int) -> tuple[str, int | None]:
        role, _, number = names[place].rpartition("-")
        return (role, int(number) - place) if number.isdigit() else (names[place], None)

    for _, run in itertools.groupby(range(len(names)), run_of):
        first, *others = (names[place] for place in run)
        yield f"{first}..{others[-1].rpartition('-')[2]}" if others else first
