"""How a run ends when it cannot go on or is told to: the promised exit code, the cause in words, and nobody left."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import psutil
import pytest
from descendants import Descendants
from whole_runs import START_TIMEOUT_S, make_run_inputs, start_run, wait_for_version

from megatron_async_rl.config.config import Config
from megatron_async_rl.engine_env import engine_python
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.launcher import roles
from megatron_async_rl.launcher.gpus import assign_gpus
from megatron_async_rl.observability.status import read_status


def running(watch: Descendants, module: str) -> list[psutil.Process]:
    """Who has this module on its command line."""
    found = []
    for process in watch.look():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if f"megatron_async_rl.{module}" in process.cmdline():
                found.append(process)
    return found


def kill_one(watch: Descendants, module: str, not_pid: int = 0) -> int:
    """SIGKILL to the process that runs this module, once there is one other than `not_pid`."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        for process in running(watch, module):
            if process.pid != not_pid:
                process.kill()
                return process.pid
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(
    engine_python() is None, reason="no engine environment: bash tools/setup_env.sh"
)
def test_restart_limit_and_second_sigterm_end_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = make_run_inputs(tmp_path).config(
        run_dir,
        run={"steps": 5000, "export_every": 0},
        data={"eval": None},
        faults={"max_restarts": 1, "restart_backoff_s": 0.1},
        megatron={"tensor_model_parallel_size": 1},
        checkpoint={"every": 2},
    )
    child = start_run(path)
    watch = Descendants(child.pid)
    wait_for_version(run_dir, 1)
    first = kill_one(watch, "reward")
    kill_one(watch, "reward", not_pid=first)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 2
    assert "error: reward-0 died 2 times (faults.max_restarts = 1)" in errors
    assert watch.left() == []

    trained = read_status(run_dir).version
    child = start_run(path)
    watch = Descendants(child.pid)
    wait_for_version(run_dir, trained + 1, states=("training",))
    for process in running(watch, "trainer"):
        process.suspend()  # it will not have saved before the second one
    child.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in output
    assert watch.left() == []


def some(servers: int, **sections: dict[str, object]) -> Config:
    from config_builders import config_tree

    from megatron_async_rl.config import load

    return load.from_tree(
        config_tree(rollout={"servers": servers, "max_new_tokens": 8}, **sections)
    )


def test_every_process_but_the_controller_can_join() -> None:
    assert roles.names(some(2)) == ["controller", "rollout-0", "rollout-1", "trainer", "reward-0"]
    roles.check_joining(["rollout-0", "rollout-17", "reward-3", "trainer"], some(2))
    for name in ("controller", "rollout", "rollout-x", "trainer-0", ""):
        with pytest.raises(ConfigError, match="cannot be started apart from the controller"):
            roles.check_joining([name], some(2))


def test_host_gives_gpus_only_to_its_own_processes() -> None:
    settings = some(3, sglang={"tp_size": 2}, megatron={"tensor_model_parallel_size": 2})
    gpus = [str(n) for n in range(8)]
    assert assign_gpus(settings, gpus)["rollout-2"] == "6,7"
    assert assign_gpus(settings, gpus, ["rollout-2", "reward-0"]) == {"rollout-2": "0,1"}
    assert assign_gpus(settings, gpus, ["trainer"]) == {"trainer": "0,1"}
    with pytest.raises(ConfigError, match="this run needs 4 GPUs: 0 trainer ranks"):
        assign_gpus(settings, gpus[:3], ["rollout-0", "rollout-5"])
