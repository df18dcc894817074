"""No orphan processes: all that a process started ends with it, also when it is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from descendants import Descendants
from paths import ROOT, SUPPORT, python_environment
from tiny_model import make_model


def start_launcher(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Starts a process that stands for the launcher and starts children like it."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=python_environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
    )


CHILD_WITH_FORKS = """
import os, sys, time
from pathlib import Path
from megatron_async_rl import processes
child = '''
import os, time
from megatron_async_rl import processes
processes.die_with_parent()
processes.make_forks_die_with_parent()
if os.fork() == 0:
    os.setsid()
    os.fork()
time.sleep(600)
'''
processes.start([sys.executable, "-c", child], Path("/dev/null"))
time.sleep(600)
"""


def test_descendants_in_other_sessions_end_with_a_killed_launcher() -> None:
    parent = start_launcher(CHILD_WITH_FORKS)
    watch = Descendants(parent.pid)
    deadline = time.monotonic() + 60
    while len(watch.look()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert watch.left() == []


CHILD_OF_ENDED_PARENT = """
import subprocess, sys, os, time
from megatron_async_rl import processes
os.environ[processes.LAUNCHER_VARIABLE] = str(os.getpid())
between = '''
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", sys.argv[1]]).pid, flush=True)
'''
late = '''
import time
time.sleep(1)
from megatron_async_rl import processes
processes.die_with_parent()
time.sleep(600)
'''
subprocess.run([sys.executable, "-c", between, late])
time.sleep(600)
"""


def test_process_whose_parent_already_ended_exits() -> None:
    """Its launcher is still alive, so only the chain of parents shows it."""
    parent = start_launcher(CHILD_OF_ENDED_PARENT)
    assert parent.stdout
    try:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has exited already
            psutil.Process(int(parent.stdout.readline())).wait(60)
    finally:
        parent.kill()
        parent.communicate()


SPAWNING_ENGINE = """
import multiprocessing, time

def sleep():
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=sleep).start()
    time.sleep(600)
"""


def test_engine_children_are_tied_to_it_before_any_import(tmp_path: Path) -> None:
    """The child does not ask for it: patches/sglang_startup on its PYTHONPATH does."""
    program = tmp_path / "engine.py"
    program.write_text(SPAWNING_ENGINE)
    parent = subprocess.Popen(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "patches" / "sglang_startup")},
    )
    deadline = time.monotonic() + 60
    while not (
        spawned := [
            p
            for p in psutil.Process(parent.pid).children()
            if "spawn_main" in " ".join(p.cmdline())
        ]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(spawned, 30)[1] == []


STARTED_RANKS = """
import sys, time
from pathlib import Path
from megatron_async_rl import processes
log, *command = sys.argv[1:]
processes.start([sys.executable, *command], Path(log))
time.sleep(600)
"""


@pytest.mark.parametrize("killed", ["rank", "launcher"])
def test_trainer_killed_while_saving_leaves_no_writers(tmp_path: Path, killed: str) -> None:
    model, run_dir, log = make_model(tmp_path / "model"), tmp_path / "run", tmp_path / "log"
    run_dir.mkdir()
    command = (
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
    )
    ranks = (
        str(SUPPORT / "checkpoint_main.py"),
        str(model),
        str(run_dir),
        "save-for-ever",
        "grpo",
        "1,1,1",
    )
    parent = start_launcher(
        STARTED_RANKS, str(log), *command, "--rdzv-endpoint=127.0.0.1:0", *ranks
    )
    watch = Descendants(parent.pid)
    try:
        deadline = time.monotonic() + 120
        while not any((run_dir / "checkpoints").glob("*/*.distcp")):  # a writer is, or was, active
            assert parent.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.01)
        [torchrun] = psutil.Process(parent.pid).children()
        [rank] = torchrun.children()
        assert len(rank.children()) >= 2  # the manager, and Python's resource tracker
        if killed == "rank":
            left = rank.children(recursive=True)
            rank.kill()
            _, alive = psutil.wait_procs(left, 30)
            assert alive == []
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.communicate()
    assert watch.left() == []
