"""The servers' figures in heartbeats, and the seconds in which a server had nothing to do."""

from __future__ import annotations

import asyncio
import time

import pytest

from megatron_async_rl.controller.monitoring.engine_monitor import EngineMonitor
from megatron_async_rl.protocol.messages import Heartbeat
from megatron_async_rl.rollout.gate import Gate


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_figures_are_means_of_the_step_over_all_servers(clock: list[float]) -> None:
    monitor = EngineMonitor()
    assert monitor.step() == {}
    for seconds, idle_s, queued in ((0.0, 5.0, 2.0), (2.0, 6.0, 4.0)):
        clock[0] = 100.0 + seconds
        figures = {"queued_requests": queued, "kv_use_fraction": 0.5}
        monitor.received("rollout-0", Heartbeat(idle_s=idle_s, engine=figures))
        figures = {"queued_requests": 1.0, "kv_use_fraction": 0.9, "unknown": 1.0}
        monitor.received("rollout-1", Heartbeat(idle_s=1.0, engine=figures))
        monitor.received("reward-0", Heartbeat(running=3))
    assert monitor.step() == {
        "perf/engine_idle_fraction": 0.25,  # 1 of 2 s of the first, nothing of the second
        "engine/queued_requests": 4.0,
        "engine/kv_use_fraction": 0.7,
    }
    assert monitor.step() == {}


def test_restarted_worker_does_not_count_as_idle(clock: list[float]) -> None:
    monitor = EngineMonitor()
    for seconds, idle_s in ((0, 50.0), (2, 0.0), (4, 0.5)):
        clock[0] = 100.0 + seconds
        monitor.received("rollout-0", Heartbeat(idle_s=idle_s))
    assert monitor.step() == {"perf/engine_idle_fraction": 0.25}


def test_gate_counts_time_without_a_request_and_time_frozen(clock: list[float]) -> None:
    async def body() -> list[float]:
        gate, idle_s = Gate(), []

        def pass_time(seconds: float) -> None:
            clock[0] += seconds
            idle_s.append(gate.idle_s)

        pass_time(3.0)  # closed, nothing in flight
        gate.open()
        async with gate.request():
            pass_time(5.0)
            gate.close()  # requests end under the old weights
            pass_time(1.0)
            gate.open()
            gate.close(freezes=True)
            pass_time(2.0)
            gate.open()
            pass_time(4.0)
        pass_time(1.0)
        return idle_s

    assert asyncio.run(body()) == [3.0, 3.0, 3.0, 5.0, 5.0, 6.0]
