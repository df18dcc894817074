"""Which processes SIGTERM ends. Slurm sends it to every process of a job at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from paths import ROOT

from megatron_async_rl import processes
from megatron_async_rl.config.sections import FaultsConfig
from megatron_async_rl.launcher.session import Session
from megatron_async_rl.launcher.supervisor import Supervisor


def descendants_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def wait_until(what: Any) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


SPAWNS = """
import multiprocessing, sys, time
from pathlib import Path
def sleep():
    Path(sys.argv[1]).touch()
    time.sleep(600)
if __name__ == "__main__":
    # starts the resource tracker too, which by itself would unblock SIGTERM
    multiprocessing.get_context("spawn").Process(target=sleep).start()
    time.sleep(600)
"""


def test_engine_and_children_block_sigterm_and_can_be_stopped(
    tmp_path: Path,
) -> None:
    (tmp_path / "engine.py").write_text(SPAWNS)
    paths = {"PYTHONPATH": str(ROOT / "patches" / "sglang_startup")}
    engine = processes.start(
        [sys.executable, str(tmp_path / "engine.py"), str(tmp_path / "ready")],
        tmp_path / "log",
        paths,
        sigterm_blocked=True,
    )
    wait_until((tmp_path / "ready").exists)
    time.sleep(1)  # for the resource tracker, which was started before
    tree = [psutil.Process(engine.pid), *descendants_of(engine.pid)]
    assert len(tree) == 3
    for process in tree:
        process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(tree, 1)
    assert len(alive) == 3
    started = time.monotonic()
    processes.stop([engine], 60.0)
    assert time.monotonic() - started < 30  # processes that block SIGTERM are killed at once
    assert psutil.wait_procs(tree[1:], 30)[1] == []


EXITS = """
import multiprocessing, sys, time
from pathlib import Path
def sleep():
    Path(sys.argv[1]).touch()
    time.sleep(600)
def run():
    multiprocessing.get_context(sys.argv[2]).Process(target=sleep, daemon=True).start()
    while not Path(sys.argv[1]).exists():
        time.sleep(0.05)
    sys.exit(3)
if __name__ == "__main__":
    if sys.argv[2] == "fork":
        from megatron_async_rl import processes
        processes.main(run, unwind=False)
    run()
"""


@pytest.mark.parametrize(("context", "path"), [("spawn", "patches/sglang_startup"), ("fork", ".")])
def test_exiting_process_does_not_wait_for_blocked_children(
    tmp_path: Path, context: str, path: str
) -> None:
    """Python sends SIGTERM to daemon children at its exit, and waits for them."""
    (tmp_path / "ends.py").write_text(EXITS)
    command = [sys.executable, str(tmp_path / "ends.py"), str(tmp_path / "ready"), context]
    child = processes.start(
        command, tmp_path / "log", {"PYTHONPATH": str(ROOT / path)}, sigterm_blocked=True
    )
    try:
        assert child.wait(60) == 3, (tmp_path / "log").read_text()
    finally:
        processes.stop([child], 0.0)


RANK = """
import multiprocessing, sys, time
from megatron_async_rl import processes
def run():
    multiprocessing.resource_tracker.ensure_running()
    print("ready", flush=True)
    time.sleep(600)
processes.main(run, unwind=False)
"""


def test_rank_ends_by_sigterm_of_its_parent_only() -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert rank.stdout and rank.stdout.readline() == b"ready\n"
    other = multiprocessing.get_context("fork").Process(
        target=os.kill, args=(rank.pid, signal.SIGTERM)
    )
    other.start()
    other.join()
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(1)
    rank.terminate()
    assert rank.wait(60) == 128 + signal.SIGTERM


def test_suspended_controller_is_preempted_too(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, FaultsConfig(), print)
    supervisor.start("controller", lambda: processes.start(["sleep", "60"], tmp_path / "log"))
    [controller] = supervisor.processes
    os.kill(controller.pid, signal.SIGSTOP)
    Session(tmp_path, supervisor, 60.0).handle_signal(signal.SIGTERM, None)
    assert controller.wait(30) == -signal.SIGTERM


def test_suspended_process_ends_without_the_grace_period(tmp_path: Path) -> None:
    child = processes.start(["sleep", "60"], tmp_path / "log")
    os.kill(child.pid, signal.SIGSTOP)
    processes.stop([child], 20.0)
    assert child.returncode == -signal.SIGTERM  # it got the signal; SIGKILL was not needed
