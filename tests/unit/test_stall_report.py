"""The error of a stalled run: which process waits for which, since when, and which are lost."""

from __future__ import annotations

import re
from types import SimpleNamespace

from core_builders import join_workers, make_core

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.monitoring.watchdog import who_waits


def test_stall_report_names_waiting_and_lost_workers() -> None:
    core = make_core(prompts_per_step=1, max_staleness=0)
    join_workers(core)
    core.handle(inputs.RolloutJoined("rollout-1", 4), 0)
    core.handle(inputs.WorkerLost("rollout-1"), 0)
    workers = [
        SimpleNamespace(name=name, hello=SimpleNamespace(role=name.partition("-")[0]))
        for name in ("rollout-0", "rollout-1", "reward-0", "trainer-0")
    ]
    report = who_waits(core, workers, None, "disk full")  # type: ignore[arg-type]
    assert report.startswith("the controller waits for the trainer; the journal cannot be written")
    assert "(disk full)" in report and "groups: 1 running" in report
    assert re.search(r"rollout-0 serving at version 0 with 2 samples, last heard \d+ s ago", report)
    assert re.search(r"reward-0 with 0 score requests, last heard \d+ s ago", report)
    assert "rollout-1 lost" in report
    assert "rollout-0 lost" not in report and "trainer-0 lost" not in report
