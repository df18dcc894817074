"""`status` of dead runs: the cause, and the way to continue, instead of an old state."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_log_builders import log_config

from megatron_async_rl.__main__ import main
from megatron_async_rl.launcher.claims import lock_path
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.observability.status import RunStatus, read_status


def write_run(run_dir: Path, pid: int, **changes: object) -> None:
    log = RunLog(run_dir, log_config(run_dir, loggers=[]))
    log.write_status(RunStatus("training", pid=pid, version=7, steps=60, eta_s=82.0, **changes))  # type: ignore[arg-type]
    log.close()


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def shown(run_dir: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["status", str(run_dir), *options]) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_run_whose_controller_is_gone_is_dead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "my run"
    write_run(run_dir, ended_process())
    text = shown(run_dir, capsys)
    assert "failed" in text and "dead since 0:0" in text and "it was training" in text
    assert "no log ends with an error: killed" in text and "1:22 left" not in text
    assert f"run '{run_dir}/config.yaml'" in text  # can be copied into a shell


def test_error_that_ended_the_run_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    write_run(run_dir, ended_process())
    (run_dir / "logs").mkdir()
    old, new = run_dir / "logs" / "trainer.log", run_dir / "logs" / "controller.log"
    old.write_text("error: of an earlier start\n" + "a later line\n" * 30)
    time.sleep(0.01)
    new.write_text("INFO: a line\nerror: the disk is full\n  free space\n")
    text = shown(run_dir, capsys)
    assert "the disk is full" in text and "an earlier start" not in text


def test_run_with_a_launcher_is_not_dead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    write_run(run_dir, ended_process())  # the launcher restarts the controller
    with lock_path(run_dir).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = shown(run_dir, capsys)
    assert "training" in text and "1:22 left" in text and "dead" not in text


def test_run_on_another_host_is_dead_when_it_has_been_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    write_run(run_dir, 1, host="another-host")
    assert "dead" not in shown(run_dir, capsys)
    later = read_status(run_dir).updated_unix + 120
    monkeypatch.setattr(time, "time", lambda: later)
    assert "dead since 2:00" in shown(run_dir, capsys)


def test_watch_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    write_run(run_dir, ended_process())
    text = shown(run_dir, capsys, "--watch")
    assert text.startswith("failed: dead since") and "config.yaml" in text
