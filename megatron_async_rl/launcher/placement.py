"""Which process of a run goes to which node of an allocation: decided from the configuration and
two numbers, so that a laptop can show it (`slurm --plan`).

    trainer's hosts    the first nodes, one each, every one with the same number of ranks
    SGLang servers     packed into the GPUs that are left, in order; a server is never split over nodes
    the rest           on the first node: controller, reward workers, with run.mode = rollout_only the recorder

With sglang.device = cpu nothing uses a GPU: servers are dealt to the nodes in turn, those without
trainer ranks first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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
        """What `join` starts: everything that is not on the first node."""
        return [name for names in self.names[1:] for name in names]

    def warnings(self) -> list[str]:
        idle = len(self.gpus) * self.gpus_per_node - sum(self.gpus)
        unused = [str(number) for number, names in enumerate(self.names) if not names]
        found = []
        if unused:
            found.append(
                f"nothing runs on node {', '.join(unused)}: ask for {len(self.names) - len(unused)} nodes"
            )
        if idle and any(self.gpus):
            where = [
                f"{self.gpus_per_node - used} of node {n}"
                for n, used in enumerate(self.gpus)
                if self._idles(n)
            ]
            found.append(
                f"{idle} of {len(self.gpus) * self.gpus_per_node} GPUs stay idle: {', '.join(where)}; raise "
                "rollout.servers, or ask for fewer nodes"
            )
        return found

    def _idles(self, node: int) -> bool:
        return self.gpus[node] < self.gpus_per_node

    def table(self) -> Table:
        table = Table(
            "node", "processes", "GPUs used", box=None, pad_edge=False, padding=(0, 3, 0, 0)
        )
        for number, names in enumerate(self.names):
            table.add_row(
                str(number),
                ", ".join(_short(names)) or "-",
                f"{self.gpus[number]} of {self.gpus_per_node}",
            )
        return table


def place(config: Config, num_nodes: int, gpus_per_node: int) -> Placement:
    """Raises ConfigError, with the numbers and what would do, when they do not fit."""
    if num_nodes < 1:
        raise ConfigError(f"a run takes at least 1 node, not {num_nodes}")
    on_cpu = config.on_cpu
    hosts = (
        config.trainer.hosts
        if on_cpu or not config.has_trainer
        else trainer_hosts(config, gpus_per_node)
    )
    hosts = hosts if config.has_trainer else 1
    config = replace(config, trainer=replace(config.trainer, hosts=hosts))
    per_server = 0 if on_cpu else config.engine_tp
    per_host = config.ranks_per_host if config.has_trainer and not on_cpu else 0
    needed = _nodes_needed(config, hosts, per_host, per_server, gpus_per_node)
    if num_nodes < needed:
        raise ConfigError(
            _does_not_fit(config, num_nodes, gpus_per_node, per_host, per_server, needed)
        )

    names: list[list[str]] = [[] for _ in range(num_nodes)]
    gpus = [0] * num_nodes
    names[0].append("controller")
    for node, name in enumerate(config.trainer_names):
        names[node].append(name)
        gpus[node] += per_host
    for server in range(config.rollout.servers):
        if per_server:
            node = next(n for n in range(num_nodes) if gpus_per_node - gpus[n] >= per_server)
        else:
            node = (hosts + server) % num_nodes
        names[node].append(f"rollout-{server}")
        gpus[node] += per_server
    names[0] += [f"reward-{number}" for number in range(config.reward.workers)]
    return Placement(hosts, names, gpus, gpus_per_node)


def trainer_hosts(config: Config, gpus_per_node: int) -> int:
    """trainer.hosts, checked against the nodes; the fewest nodes that hold the ranks where it is
    not set (1).

    A tensor-parallel group talks in every layer, over NVLink: it must not span nodes.
    """
    ranks, tp, chosen = (
        config.trainer_ranks,
        config.parallel_size("tensor_model"),
        config.trainer.hosts,
    )
    if tp > gpus_per_node:
        raise ConfigError(
            f"megatron.tensor_model_parallel_size = {tp} is more than the {gpus_per_node} GPUs of a node, and a "
            f"tensor-parallel group must not span nodes; set it to at most {gpus_per_node}, or take nodes with more GPUs"
        )
    fitting = [h for h in _divisors(ranks) if ranks // h <= gpus_per_node and ranks // h % tp == 0]
    if chosen == 1:
        return fitting[0]  # there is one: each tensor-parallel group on a node of its own
    if chosen in fitting:
        return chosen
    per_host = ranks // chosen
    rule = (
        f"{per_host} ranks a node, and a node has {gpus_per_node} GPUs"
        if per_host > gpus_per_node
        else f"{per_host} ranks a node, which cuts through a group of megatron.tensor_model_parallel_size = {tp}"
    )
    raise ConfigError(
        f"trainer.hosts = {chosen} puts {ranks} / {chosen} = {rule}; set it to one of {', '.join(map(str, fitting))}, or "
        f"leave it out for {fitting[0]}"
    )


def _nodes_needed(
    config: Config, hosts: int, per_host: int, per_server: int, gpus_per_node: int
) -> int:
    if not per_server:
        return hosts
    if per_server > gpus_per_node:
        raise ConfigError(
            f"sglang.tp_size = {per_server} is more than the {gpus_per_node} GPUs of a node, and a server is never split "
            f"over nodes; set it to at most {gpus_per_node}, or take nodes with more GPUs"
        )
    beside_trainers = hosts * ((gpus_per_node - per_host) // per_server)
    left = max(0, config.rollout.servers - beside_trainers)
    return hosts + -(-left // (gpus_per_node // per_server))


def _does_not_fit(
    config: Config, nodes: int, gpus: int, per_host: int, per_server: int, needed: int
) -> str:
    hosts, servers = config.trainer.hosts, config.rollout.servers
    if not per_server:
        return f"trainer.hosts = {hosts} is more than the {nodes} nodes; ask for {hosts} nodes, or lower it"
    parts = [f"{hosts} nodes with {per_host} trainer ranks each"] if per_host else []
    parts.append(f"rollout.servers = {servers} of sglang.tp_size = {per_server}")
    remedy = f"ask for {needed} nodes (--nodes={needed})"
    room = hosts * ((gpus - per_host) // per_server) + (nodes - hosts) * (gpus // per_server)
    if nodes >= hosts and room > 0:
        remedy += f", or set rollout.servers to at most {room}"
    return f"{' and '.join(parts)} do not fit on {nodes} nodes of {gpus} GPUs; {remedy}"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _short(names: Iterable[str]) -> Iterator[str]:
    """rollout-0, rollout-1, rollout-2 as rollout-0..2."""
    run: list[tuple[str, int]] = []
    for name in [*names, ""]:
        match = re.fullmatch(r"(.+)-(\d+)", name)
        this = (match[1], int(match[2])) if match else (name, -1)
        if run and match and this == (run[-1][0], run[-1][1] + 1):
            run.append(this)
            continue
        if run:
            (role, first), (_, last) = run[0], run[-1]
            yield role if first < 0 else f"{role}-{first}" + (f"..{last}" if last > first else "")
        run = [this] if name else []
