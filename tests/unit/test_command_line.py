"""Wrong command lines end with the problem and how to write it; temporary files of a command."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from paths import ROOT

from megatron_async_rl import processes
from megatron_async_rl.__main__ import main
from megatron_async_rl.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run"], "the following arguments are required: CONFIG\n"),
        (["run", "a.yaml", "--steps", "3"], "--steps 3; settings are written as run.steps=3\n"),
        (["status", "run", "--steps"], "unrecognized arguments: --steps\n"),
        (["rum"], "invalid choice: 'rum'"),
    ],
)
def test_wrong_argument_is_named(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert problem in capsys.readouterr().err


def test_python_without_the_packages_is_named() -> None:
    command = [sys.executable, "-S", "-m", "megatron_async_rl", "run", "a.yaml"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sys.executable} has no package msgspec; set MEGATRON_")


def test_launcher_names_a_python_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "launchers" / "megatron-async-rl", "doctor"],
        env={"MEGATRON_ASYNC_RL_PYTHON": f"{tmp_path}/python", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: MEGATRON_ASYNC_RL_PYTHON = {tmp_path}/python is no program; set" in done.stderr


def test_folder_too_deep_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", f"/{'x' * 59}")
    with (
        pytest.raises(ConfigError, match=r"TMPDIR = /x+ has 60 bytes, must have less than 60"),
        processes.temporary_folder(),
    ):
        pass


def test_temporary_folder_is_locked_against_cleaners_and_made_again_for_a_child(
    tmp_path: Path,
) -> None:
    with processes.temporary_folder() as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # systemd-tmpfiles then skips the folder
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        folder.rmdir()
        log = tmp_path / "log"
        child = processes.start(["stat", "-c%a", folder], log, {"TMPDIR": str(folder)})
        assert child.wait() == 0 and log.read_text() == "700\n"
    assert not folder.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_temporary_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    with processes.temporary_folder() as folder:
        os.chown(folder, 65534, -1)
        with pytest.raises(PermissionError, match=f"another user.*{folder}"):
            processes.start(["true"], tmp_path / "log", {"TMPDIR": str(folder)})


def test_temporary_folder_survives_the_end_of_a_fork() -> None:
    context = processes.temporary_folder()
    folder = context.__enter__()
    fork = multiprocessing.get_context("fork").Process(
        target=context.__exit__, args=(None, None, None)
    )
    fork.start()
    fork.join()
    assert fork.exitcode == 0 and folder.is_dir()
    context.__exit__(None, None, None)
    assert not folder.exists()
