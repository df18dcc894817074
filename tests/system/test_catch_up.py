"""Whole runs with weight updates through the disk.

Either every update does, or only the catch-up of a server that hung, was fenced and restarted,
while the other server continues over the network.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from needs import needs_engine
from whole_runs import (
    FinishedRun,
    RunInputs,
    assert_no_process_left,
    fresh_logprobs,
    processes_of_run,
    start_run,
)

from megatron_async_rl.storage import snapshots

pytestmark = needs_engine
STEPS = 4


def test_run_with_disk_transport(run_inputs: RunInputs, tmp_path: Path) -> None:
    """With two pipeline stages, which each write their own files."""
    run_dir = tmp_path / "run"
    path = run_inputs.config(
        run_dir,
        run={"steps": STEPS},
        weights={"bucket_bytes": 65536, "transport": "disk"},
        megatron={"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2, "lr": 0.01},
    )
    child = start_run(path)
    output, errors = child.communicate(timeout=400)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    run = FinishedRun(run_dir, output)
    served = [
        line for line in run.log("controller").splitlines() if " is served by rollout-0" in line
    ]
    assert len(served) == STEPS + 1 and all(
        "check_files " in line and "digest " in line for line in served
    )
    assert any(" 0 requests interrupted" not in line for line in served)
    whole = snapshots.list_snapshots(run_dir)
    assert [snapshot.version for snapshot in whole] == [STEPS, STEPS - 1]
    assert {name[:11] for name in whole[0].manifest.files if name.startswith("model-")} == {
        "model-00001",
        "model-00002",
    }
    lines = [line for line in run.samples if any(version > 0 for version, _ in line.versions)][:8]
    assert lines
    for line in lines:
        done = 0
        for version, count in line.versions:
            these = slice(done, done + count)
            logprobs = np.asarray(line.logprobs[these])
            np.testing.assert_allclose(
                logprobs, fresh_logprobs(run_dir, version, line)[these], atol=1e-3
            )
            done += count
    assert_no_process_left(run_dir)


def wait_for(what: Callable[[], object], limit_s: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


def engine_of(run_dir: Path, name: str) -> list[psutil.Process]:
    """Returns the processes of a rollout worker's server."""
    workers = [
        p
        for p in processes_of_run(run_dir)
        if p.info["cmdline"][-1] == name and "megatron_async_rl.rollout" in p.info["cmdline"]
    ]
    return [child for worker in workers for child in worker.children(recursive=True)]


def test_fenced_server_catches_up_from_disk_while_the_other_continues(
    run_inputs: RunInputs, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    path = run_inputs.config(
        run_dir,
        run={"steps": 500, "export_every": 0},
        rollout={"servers": 2, "max_new_tokens": 64, "max_concurrent_samples": 8},
        weights={"bucket_bytes": 65536, "snapshot_every": 1, "update_timeout_s": 10.0},
        faults={"restart_backoff_s": 0.1},
        megatron={"tensor_model_parallel_size": 1, "lr": 0.01},
    )
    child = start_run(path)
    log_file = run_dir / "logs" / "controller.log"

    def log() -> str:
        return log_file.read_text() if log_file.exists() else ""

    def in_log(pattern: str, after: int = 0) -> int:
        """Returns the end of the first match after `after`, or 0 without a match."""
        found = re.search(pattern, log()[after:])
        return after + found.end() if found else 0

    both = r"version \d+ is served by rollout-0, rollout-1"
    alone = r"version (\d+) is served by rollout-0[^,]"
    try:
        wait_for(lambda: in_log(both.replace(r"\d+", "1")) or child.poll() is not None, 200, log)
        stopped = engine_of(run_dir, "rollout-1")
        assert stopped
        for process in stopped:
            os.kill(process.pid, signal.SIGSTOP)
        wait_for(lambda: in_log(r"rollout-1 is fenced"), 90, log)
        fenced = in_log(r"rollout-1 is fenced")
        wait_for(lambda: in_log(r"rollout-1 has caught up with version \d+ from", fenced), 300, log)
        back = in_log(r"rollout-1 has caught up with version \d+ from", fenced)
        assert len(re.findall(alone, log()[fenced:back])) >= 2  # the other server continued alone
        wait_for(lambda: in_log(both, back), 90, log)  # it joins the next network update
        assert "error" not in log()[back:].lower()
    finally:
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=120)
    assert child.returncode == 130, output[-2000:] + errors[-2000:]
    caught = re.search(r"rollout-1 has caught up with version (\d+) from (\S+) in", log()[fenced:])
    assert caught and Path(caught[2]).name == f"v{int(caught[1]):06d}.0"
    first, *_, last = map(int, re.findall(alone, log()[fenced:back]))
    assert first <= int(caught[1]) <= last
    assert_no_process_left(run_dir)
