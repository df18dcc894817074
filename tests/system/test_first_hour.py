"""What a newcomer does in the first hour: stops a run too early, kills it, presses Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from descendants import Descendants
from needs import needs_engine
from paths import python_environment
from whole_runs import make_run_inputs, start_run, wait_for_version


def status_text(run_dir: Path) -> str:
    command = [sys.executable, "-m", "megatron_async_rl", "status", str(run_dir)]
    done = subprocess.run(
        command, env=python_environment(), capture_output=True, text=True, check=True
    )
    return " ".join(done.stdout.replace("│", " ").split())


@needs_engine
def test_run_that_is_stopped_too_early_killed_and_interrupted(tmp_path: Path) -> None:
    run_dir, inputs = tmp_path / "run", make_run_inputs(tmp_path)

    def config(seed: int) -> Path:
        return inputs.config(
            run_dir,
            run={"steps": 5000, "export_every": 0, "seed": seed},
            evaluation={"sets": {}},
            megatron={"tensor_model_parallel_size": 1},
        )

    # SIGTERM before the first step: there is nothing to save
    child = start_run(config(seed=3))
    watch = Descendants(child.pid)
    wait_for_version(run_dir, 0, states=("training",))
    child.send_signal(signal.SIGTERM)
    signaled = time.monotonic()
    output, _ = child.communicate(timeout=40)
    assert child.returncode == 75 and "preempted" in output
    assert time.monotonic() - signaled < 25  # faults.shutdown_grace_s is 60
    assert "Traceback" not in (run_dir / "logs" / "trainer.log").read_text()
    assert watch.left() == []

    # kill -9: the status says that the run is dead
    (run_dir / "samples.jsonl").unlink()  # a batch may have been selected just before the signal
    child = start_run(config(seed=4))  # a run without a step does not claim the folder
    watch = Descendants(child.pid)
    wait_for_version(run_dir, 1)
    child.kill()
    child.communicate(timeout=30)
    assert (tmp_path / "run.1").is_dir()
    assert watch.left() == []
    text = status_text(run_dir)
    assert "dead since" in text and "killed" in text and f"run {run_dir}/config.yaml" in text

    # Ctrl-C: says what it waits for
    child = start_run(run_dir / "config.yaml")
    watch = Descendants(child.pid)
    wait_for_version(run_dir, 2, states=("training",))
    child.send_signal(signal.SIGINT)
    signaled = time.monotonic()
    output, _ = child.communicate(timeout=40)
    assert child.returncode == 130 and "SIGINT: stopping controller, rollout-0" in output
    assert time.monotonic() - signaled < 12
    assert watch.left() == []
    assert "stopped at once" in status_text(run_dir)


@needs_engine
def test_reward_function_that_always_raises_ends_the_run_with_its_traceback(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = make_run_inputs(tmp_path).config(
        run_dir,
        run={"steps": 5000, "export_every": 0},
        reward={"function": "loop_reward:broken"},
        faults={"max_failed_groups": 8},
        megatron={"tensor_model_parallel_size": 1},
    )
    child = start_run(path)
    watch = Descendants(child.pid)
    output, errors = child.communicate(timeout=240)
    assert child.returncode == 2
    assert "groups in a row could not be generated and scored" in errors
    assert "ValueError: no answer in the row" in errors and "loop_reward.py" in errors
    assert "eval 0.0%" not in output
    log = (run_dir / "logs" / "controller.log").read_text()
    assert "evaluation of version 0, held_out: no sample has a score" in log
    assert log.count("ValueError: no answer in the row") < 20
    assert watch.left() == []


@needs_engine
def test_run_in_which_no_group_passes_the_filters_ends_with_the_reason(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = make_run_inputs(tmp_path).config(
        run_dir,
        run={"steps": 5000, "export_every": 0},
        evaluation={"sets": {}},
        reward={"function": "loop_reward:constant"},
        algorithm={
            "prompts_per_step": 4,
            "samples_per_prompt": 2,
            "filters": {"drop_equal_rewards": True},
        },
        faults={"max_filtered_groups": 64},
        megatron={"tensor_model_parallel_size": 1},
    )
    child = start_run(path)
    watch = Descendants(child.pid)
    output, errors = child.communicate(timeout=240)
    found = "groups in a row (equal_rewards 100%; mean reward 1.000) and none passed"
    assert child.returncode == 2
    assert f"error: algorithm.filters dropped 64 {found}" in errors
    assert f"warning: algorithm.filters dropped 4 {found}; the run ends at 64" in output
    assert "dropped 4 groups in a row" in status_text(run_dir)
    assert watch.left() == []
