#!/usr/bin/env python3
"""Simulates weight updates that reach the servers in waves, against one that reaches all at once.

    python tools/bench/bench_rolling_updates.py
    python tools/bench/bench_rolling_updates.py --waves 1 --kv-lease-limit 0    # leases by number

64 servers and a trainer, by the simulation of `plan` (planning/simulation.py), which runs the
controller's core: 8B on H100, costs by planning/hardware.py, answers log-normal with mean 8k and at
most 32k tokens. At an update a server computes its running samples again (weights.kv_cache:
recompute). The trainer continues after the first wave, as if servers passed the weights on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.planning.costs import Costs, DecodeCosts, PrefillCosts, TrainCosts
from megatron_async_rl.planning.lengths import log_normal
from megatron_async_rl.planning.server import Server
from megatron_async_rl.planning.simulation import Simulation, Workload

SERVERS, WARM_UP = 64, 4
COSTS = Costs(
    decode=DecodeCosts(step_s=7.8e-3, sample_s=2.2e-5, context_token_s=5.06e-8),
    prefill=PrefillCosts(token_s=2.25e-5, token_pair_s=7.6e-10),
    train=TrainCosts(token_s=6.8e-5, forward_passes=1, replicas=12),
    update_s=1.0,
    kv_tokens=366_000,
)


class RollingUpdates(Simulation):
    """Updates the servers in `waves` of equal size, begun `interval_s` after each other."""

    def __init__(self, workload: Workload, waves: int, interval_s: float) -> None:
        super().__init__(workload, COSTS)
        self.waves, self.interval_s = waves, interval_s

    def _update(self) -> None:
        servers = list(self.servers.values())
        for wave in range(self.waves):
            members = servers[wave :: self.waves]
            self._at(wave * self.interval_s, lambda members=members: self._begin(members))
        self._at(self.costs.update_s, self._request_batch)

    def _begin(self, members: list[Server]) -> None:
        version = self.core.version
        for server in members:
            self._handle(inputs.UpdateStarted(server.name))
            server.interrupt(self.now, self.workload.keep_kv)
            self._wake_later(server)
        self._at(self.costs.update_s, lambda: self._end(members, version))

    def _end(self, members: list[Server], version: int) -> None:
        for server in members:
            server.resume(version, self.now)
            self._wake_later(server)
            self._handle(inputs.ServerUpdated(server.name, version=version))


def workload(max_staleness: int, steps: int, kv_lease_limit: float | None) -> Workload:
    settings = CoreSettings(
        prompts_per_step=128,
        samples_per_prompt=16,
        max_staleness=max_staleness,
        wait_for_stragglers=True,
        straggler_timeout_s=1e9,
        max_new_tokens=32768,
        temperature=1.0,
        lease_timeout_s=1e9,
        max_attempts=3,
        max_scoring_attempts=2,
        heartbeat_timeout_s=1e9,
        steps=steps,
        data_parallel_size=1,
        kv_lease_limit=kv_lease_limit,
    )
    return Workload(
        settings=settings,
        lengths=log_normal(8192, 32768, 512),
        servers=SERVERS,
        concurrent=256,
        max_running=256,
        interrupt="abort",
        keep_kv=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--spread-s", type=float, default=80.0, help="time from first to last wave")
    parser.add_argument("--waves", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--kv-lease-limit", type=float, default=0.9, help="0: no limit")
    arguments = parser.parse_args()
    columns = "step s | tokens/s | mean staleness | max | trainer waits | retracted"
    print(f"| max_staleness | waves | {columns} |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for max_staleness in (1, 4):
        for waves in arguments.waves:
            interval_s = arguments.spread_s / waves
            work = workload(max_staleness, arguments.steps, arguments.kv_lease_limit or None)
            run = RollingUpdates(work, waves, interval_s)
            steps = list(run.steps())[WARM_UP:]
            seconds = sum(step.seconds for step in steps)
            tokens = sum(step.trained_tokens for step in steps)
            staleness = sum(step.mean_staleness for step in steps) / len(steps)
            waited = sum(step.wait_s for step in steps) / seconds
            retracted = sum(server.num_retracted for server in run.servers.values())
            print(
                f"| {max_staleness} | {waves} | {seconds / len(steps):.0f} "
                f"| {tokens / seconds:,.0f} | {staleness:.2f} "
                f"| {max(step.max_staleness for step in steps)} | {waited:.0%} | {retracted:,} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
