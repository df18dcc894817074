"""How a launcher reports the end of its processes, over a real process that is killed."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from config_builders import trainer_config

from megatron_async_rl import processes
from megatron_async_rl.launcher.session import TORCHRUN_REPORT, Session
from megatron_async_rl.launcher.supervisor import Supervisor

NAME = "reward-0"


def failure_text(run_dir: Path, earlier: str, *logged: str) -> str:
    """Returns the text of a run whose process is killed after each of its starts.

    `earlier`: its log before the first start. `logged`: what it wrote after each.
    """
    config = trainer_config()
    supervisor = Supervisor(run_dir, config.faults, lambda _: None)
    session = Session(run_dir, supervisor, 1.0)
    log = session.log_path(NAME)
    log.parent.mkdir()
    log.write_text(earlier)
    session.start(config, [NAME], run_dir)
    [child] = supervisor.children.values()
    for number, text in enumerate(logged or [""]):
        if number:
            supervisor._restart(child, 0.0)
        child.process.kill()
        child.process.wait()
        with log.open("a") as file:
            file.write(text)
    assert session.poll()
    return session.failure_text()


def test_error_of_an_earlier_start_is_not_blamed_for_a_kill(tmp_path: Path) -> None:
    text = failure_text(tmp_path, "error: the port is taken\n  choose another\nlast line\n")
    log = tmp_path / "logs" / f"{NAME}.log"
    assert text.strip() == f"{NAME} ended with exit code -9; its log: {log}"


def test_failure_text_is_of_the_newest_restart(tmp_path: Path) -> None:
    """A restarted process appends to its log, where earlier failures stay."""
    text = failure_text(
        tmp_path,
        "",
        "error: the port is taken\n",
        f"{TORCHRUN_REPORT}1] failed\n",
        "NameError: x\n",
    )
    assert text.endswith("\nNameError: x") and "port" not in text


def test_traceback_of_a_rank_is_shown_without_the_report_of_torchrun(tmp_path: Path) -> None:
    api = "E1126 10:05:49 19981 /lib/torch/distributed/elastic/multiprocessing/api.py:1002] failed"
    later = f"Traceback:\nNameError: x\n{api} (exitcode: 1)\nTraceback:\nChildFailedError\n"
    text = failure_text(tmp_path, "", later)
    assert text.endswith("NameError: x") and "torch" not in text


def test_signal_that_killed_a_rank_is_shown(tmp_path: Path) -> None:
    kill = f"E1126 {TORCHRUN_REPORT}1002] failed (exitcode: -9) local_rank: 1 (pid: 7)"
    later = f"loading\n{kill} of binary: python\nTraceback:\nChildFailedError\n"
    text = failure_text(tmp_path, "", later)
    assert text.endswith(f"loading\n{kill} of binary: python")


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    size = processes.LOG_END_BYTES
    log.write_bytes(b"error: old\n" + b"x" * 99 + b"\n" + bytes(size))
    assert processes.error_text(log) is None
    with log.open("ab") as file:
        file.write(b"\nerror: new\n  free space\n\xff\n")
    assert processes.error_text(log) == "new\nfree space"
    assert processes.error_text(log, processes.log_size(log)) is None
    # a log that was rotated since
    log.write_text("error: after the rotation\n")
    assert processes.error_text(log, size) == "after the rotation"
    assert processes.log_end(tmp_path / "none.log") == []


def test_controller_that_was_told_to_end_ends_the_run_as_preempted(tmp_path: Path) -> None:
    """Others have been told by it to end, also on other hosts: restarted alone it would wait."""
    supervisor = Supervisor(tmp_path, trainer_config().faults, lambda _: None)
    session = Session(tmp_path, supervisor, 60.0)
    for name, code in (("controller", processes.EXIT_REQUEUE), ("trainer", 0)):
        command = [sys.executable, "-c", f"raise SystemExit({code})"]
        supervisor.start(name, partial(processes.start, command, tmp_path / "log"))
    supervisor._has_trained = True
    [process.wait() for process in supervisor.processes]
    assert session.poll() and session.preempted and not supervisor.failed
