"""`run` and `join` with an earlier run in run.dir."""

from __future__ import annotations

import io
import os
import resource
import socket
import time
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from run_log_builders import log_config, sample_of_versions, trained_group

from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError, Error
from megatron_async_rl.launcher import join, run
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.observability.status import RunState, RunStatus
from megatron_async_rl.storage import model_digests


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")


def leave_run(run_dir: Path, state: RunState, version: int) -> Config:
    """Leaves the files of a run of 10 steps that has ended in this state and version."""
    config = log_config(run_dir, loggers=[])
    run_dir.mkdir()
    run._make_new_keys(run_dir)
    time.sleep(0.01)
    (run_dir / "config.yaml").write_text(load.dump(config))
    (run_dir / "journal.sqlite").touch()
    log = RunLog(run_dir, config)
    if version:
        log.write_samples(0, [trained_group(sample_of_versions((0, 3)))])
    log.write_status(RunStatus(state, version=version, steps=10))
    log.close()
    return config


def with_seed(config: Config, seed: int) -> Config:
    return msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, seed=seed))


def test_stopped_run_is_resumed_even_if_a_complete_one_would_be_renamed(tmp_path: Path) -> None:
    config = leave_run(tmp_path / "run", "stopped", 7)
    assert run._is_kept(tmp_path / "run", config, "rename if complete")
    assert run._is_kept(tmp_path / "run", config, "resume")
    assert not run._is_kept(tmp_path / "run", config, "rename")


def test_complete_run_is_renamed_if_asked(tmp_path: Path) -> None:
    config = leave_run(tmp_path / "run", "finished", 10)
    assert not run._is_kept(tmp_path / "run", config, "rename if complete")
    assert run._is_kept(tmp_path / "run", config, "resume")
    with run._owned(tmp_path / "run", config, "rename if complete", Console(file=io.StringIO())):
        assert list((tmp_path / "run").iterdir()) == []
    assert (tmp_path / "run.1" / "config.yaml").exists()


def test_launcher_that_owns_the_folder_is_named(tmp_path: Path) -> None:
    run_dir, console = tmp_path / "run", Console(file=io.StringIO())
    config = log_config(run_dir, loggers=[])
    for _ in range(2):  # the second time the file has the first owner
        with run._owned(run_dir, config, "resume", console):
            owner = (
                rf"in use by another run \(process {os.getpid()} on {socket.gethostname()}\); stop"
            )
            with pytest.raises(ConfigError, match=owner):
                run._owned(run_dir, config, "resume", console).__enter__()


def test_owner_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a full disk
    try:
        config, console = log_config(tmp_path / "run", loggers=[]), Console(file=io.StringIO())
        with run._owned(tmp_path / "run", config, "resume", console):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_run_without_a_step_does_not_claim_the_folder(tmp_path: Path) -> None:
    config = leave_run(tmp_path / "run", "failed", 0)
    assert run._is_kept(tmp_path / "run", config, "resume")
    assert not run._is_kept(tmp_path / "run", with_seed(config, 7), "resume")


def test_changed_model_is_refused_at_the_next_start(tmp_path: Path) -> None:
    """Weights of the same size are those of another model; an added README changes nothing."""
    model, run_dir = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = model / "model.safetensors"
    weights.write_bytes(bytes(5 << 20))
    config = leave_run(run_dir, "stopped", 7)
    config = msgspec.structs.replace(
        config, model=msgspec.structs.replace(config.model, path=str(model))
    )
    (run_dir / "config.yaml").write_text(load.dump(config))
    model_digests.record(run_dir, config)
    for name in ("README.md", "tokenizer_config.json.bak", "chat_template.jinja~"):
        (model / name).write_text("new")
    assert run._is_kept(run_dir, config, "resume")
    for path, content in (
        (model / "config.json", b"{ }"),
        (model / "chat_template.jinja", b"{{ messages }}"),
        (weights, bytes(2 << 20) + b"1" * (1 << 20) + bytes(2 << 20)),
    ):
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        with pytest.raises(
            ConfigError, match=rf"^model\.path = .*model: {path.name} is not the file"
        ):
            run._is_kept(run_dir, config, "resume")
        path.write_bytes(before) if before is not None else path.unlink()
    assert run._is_kept(run_dir, config, "resume")


def test_run_with_a_step_claims_the_folder(tmp_path: Path) -> None:
    config = leave_run(tmp_path / "run", "failed", 1)
    with pytest.raises(ConfigError, match=r"run\.seed = 7, but the run in .* was started with 1"):
        run._is_kept(tmp_path / "run", with_seed(config, 7), "resume")


def test_joining_a_complete_run_ends_with_the_reason(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", "finished", 10)
    with pytest.raises(Error, match="is complete: there is nothing to join"):
        join.join(tmp_path / "run", ["rollout-1"])


def test_joining_waits_for_a_run_that_was_just_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = leave_run(tmp_path / "run", "finished", 10)
    time.sleep(0.01)
    run._make_new_keys(tmp_path / "run")  # `run` with more steps; the status is the old one
    short = msgspec.structs.replace(config.trainer, start_timeout_s=0.3)
    config = msgspec.structs.replace(config, trainer=short)
    (tmp_path / "run" / "config.yaml").write_text(load.dump(config))
    with pytest.raises(Error, match="no running controller"):
        join.join(tmp_path / "run", ["rollout-1"])
    assert "waiting for a running controller" in capsys.readouterr().out
