"""How a run ends at its restart limit or by a second signal: exit code, cause, no process left."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import psutil
from descendants import Descendants
from needs import needs_engine
from whole_runs import (
    SHORT_ROLLOUT,
    START_TIMEOUT_S,
    make_run_inputs,
    start_run,
    wait_for_version,
)

from megatron_async_rl.observability.status import read_status


def running_processes(watch: Descendants, module: str) -> list[psutil.Process]:
    """Returns the processes that run this module of the package."""
    found = []
    for process in watch.look():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if f"megatron_async_rl.{module}" in process.cmdline():
                found.append(process)
    return found


def kill_one(watch: Descendants, module: str, not_pid: int = 0) -> int:
    """Sends SIGKILL to a process that runs this module, waiting for one other than `not_pid`."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        for process in running_processes(watch, module):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid != not_pid:
                    process.kill()
                    return process.pid
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_engine
def test_restart_limit_and_second_sigterm_end_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = make_run_inputs(tmp_path).config(
        run_dir,
        run={"steps": 5000, "export_every": 0},
        evaluation={"sets": {}},
        rollout=SHORT_ROLLOUT,
        faults={"max_restarts": 1, "restart_backoff_s": 0.1},
        megatron={"tensor_model_parallel_size": 1},
        checkpoint={"every": 2},
    )
    child = start_run(path)
    watch = Descendants(child.pid)
    wait_for_version(run_dir, 1, child=child)
    first = kill_one(watch, "reward")
    kill_one(watch, "reward", not_pid=first)
    _, errors = child.communicate(timeout=200)
    assert child.returncode == 2
    assert "error: reward-0 died 2 times (faults.max_restarts = 1)" in errors
    assert watch.left() == []

    trained = read_status(run_dir).version
    child = start_run(path)
    watch = Descendants(child.pid)
    wait_for_version(run_dir, trained + 1, ("training",), child)
    for process in running_processes(watch, "trainer"):
        process.suspend()  # so that no checkpoint is saved before the second signal
    log, told = run_dir / "logs" / "controller.log", "the job was told to end (SIGTERM)"
    count = log.read_text().count(told)  # by the end of the first start
    child.send_signal(signal.SIGTERM)
    while log.read_text().count(told) == count:  # two at once would be one signal
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=55)  # less than faults.shutdown_grace_s
    assert child.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in output
    assert watch.left() == []
