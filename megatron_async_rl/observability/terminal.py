"""Follows a run on a terminal: a live panel, or one line per change where there is no terminal.

It reads only `status.json`, so any shell that sees the run's folder can follow the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live

from megatron_async_rl.observability import panel
from megatron_async_rl.observability.status import FINAL_STATES, RunStatus, find_status

POLL_S = 0.5
PLAIN_LINE_S = 5.0  # without a terminal: one line this often before training
STEP_LINE_S = 60.0  # and during training while no step completes


def follow(
    run_dir: Path,
    stop: Callable[[], bool],
    console: Console | None = None,
    previous: RunStatus | None = None,
) -> None:
    """Shows the run until `stop()` is true; `stop` is called at every poll.

    `previous`: the status that an earlier start of the run left, which is not shown.
    """
    console = console or Console()
    started = time.monotonic()
    show(lambda: _read(run_dir, previous, time.monotonic() - started), stop, console)


def show(read: Callable[[], RunStatus], stop: Callable[[], bool], console: Console) -> None:
    """Shows the status from `read` until `stop()` is true; both are called at every poll."""
    started = time.monotonic()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while not stop():
                live.update(panel.render(read()), refresh=True)
                time.sleep(POLL_S)
            live.update(panel.render(read()), refresh=True)
        return
    shown, shown_at = None, 0.0
    notes: list[str] = []
    while True:
        stopping = stop()  # before the read: the last status written is still shown
        status = read()
        for note in status.notes:
            if note not in notes:
                console.print(f"warning: {note}", soft_wrap=True, markup=False, highlight=False)
        notes = status.notes
        change = (status.state, status.version, status.message)
        waiting = status.state not in FINAL_STATES
        limit_s = STEP_LINE_S if status.state == "training" else PLAIN_LINE_S
        if change != shown or (waiting and time.monotonic() - shown_at > limit_s - POLL_S):
            text = panel.log_line(status)
            if waiting and change == shown:
                text += f" | {panel.duration_text(time.monotonic() - started)} so far"
            console.print(text, soft_wrap=True, markup=False, highlight=False)
            shown, shown_at = change, time.monotonic()
        if stopping:
            return
        time.sleep(POLL_S)


def _read(run_dir: Path, previous: RunStatus | None, waited_s: float) -> RunStatus:
    """Returns the status of this start, not the one `previous` that an earlier one left."""
    status = find_status(run_dir)
    if status is None or status == previous:
        return RunStatus(message="waiting for the controller", elapsed_s=waited_s)
    return status
