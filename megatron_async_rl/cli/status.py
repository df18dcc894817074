"""`status`: shows the state of a run or, if it is over or dead, how it ended and how to continue.

status.json is out of date once its writer has ended. A run is dead if no `run` holds the lock of
run.dir and the controller that status.json names is gone: its pid on this host, or from another
host, where pids cannot be checked, if it has been silent for SILENT_S.
"""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
from rich.console import Console

from megatron_async_rl import processes
from megatron_async_rl.launcher.claims import has_launcher
from megatron_async_rl.observability import panel, terminal
from megatron_async_rl.observability.status import FINAL_STATES, RunStatus, read_status
from megatron_async_rl.program import command

END_LINES = 20  # of a log: an error above them did not end the process


def run(run_dir: Path, watch: bool = False) -> int:
    """Shows the run, with `watch` until it ends. Raises DataError if the folder has no run."""
    console = Console()
    status = actual_status(run_dir)
    if watch:
        status = _follow(run_dir, status, console)
    else:
        console.print(panel.render(status))
    console.print(panel.ledger_table(status))
    if status.state in ("failed", "stopped"):
        resume = command("run", run_dir / "config.yaml")
        text = f"continue, from the folder in which it was started: {resume}"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    return 0


def _follow(run_dir: Path, status: RunStatus, console: Console) -> RunStatus:
    """Shows the run until it ends, and returns its last status."""

    def read() -> RunStatus:
        nonlocal status
        if status.state not in FINAL_STATES:
            status = actual_status(run_dir)
        return status

    terminal.show(read, lambda: status.state in FINAL_STATES, console)
    return status


def actual_status(run_dir: Path) -> RunStatus:
    """Returns the status; of a dead run as failed, with the error that ended it."""
    status = read_status(run_dir)
    if status.state in FINAL_STATES or not _is_dead(run_dir.resolve(), status):
        return status
    age = panel.duration_text(panel.age_s(status))
    message = f"dead since {age} (it was {status.state}): {_last_error(run_dir)}"
    return msgspec.structs.replace(status, state="failed", message=message, fleet=[])


def _is_dead(run_dir: Path, status: RunStatus) -> bool:
    if has_launcher(run_dir):
        return False
    if status.host == socket.gethostname():
        return not processes.is_ours(status.pid)
    return panel.age_s(status) > panel.SILENT_S


def _last_error(run_dir: Path) -> str:
    """Returns the error with which the log written last ends, or that there is none."""
    logs = sorted((run_dir / "logs").glob("*.log"), key=lambda log: -log.stat().st_mtime)
    for log in logs:
        end = processes.log_end(log)[-END_LINES:]
        text = processes.error_text(log)
        if text and any(line == f"error: {text.splitlines()[0]}" for line in end):
            return f"{text} ({log})"
        if any(line.startswith("Traceback ") for line in end):
            return f"{end[-1]} ({log})"
    return (
        "no process of it is left, and no log ends with an error: killed (kill -9, out of memory, "
        f"end of the session or of the host); logs: {run_dir / 'logs'}"
    )
