"""`join`: starts processes of an existing run on this host and supervises them.

It adds hosts to a run, adds workers, or replaces those of a lost host. Configuration, address and
keys come from the run's folder, which all hosts share.

    a name that is in use    the new process takes it over: the controller requeues the old one's
                             samples and rejects its messages, its launcher does not restart it
    `run` started again      has new keys: the processes here are restarted with them
    end of the run           ends this launcher; so does a controller without news in status.json
                             for run.no_progress_timeout_s
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_async_rl import processes
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError, Error
from megatron_async_rl.launcher import roles
from megatron_async_rl.launcher.claims import controller_key
from megatron_async_rl.launcher.session import STOP_GRACE_S, Session, show
from megatron_async_rl.launcher.supervisor import Supervisor
from megatron_async_rl.observability.status import FINAL_STATES, STATUS_FILE, find_status

POLL_S = 0.2


def join(run_dir: Path, names: Sequence[str], ignore_more_sigterms: bool = False) -> int:
    """Runs `names` to the end of the run and returns the exit code.

    `ignore_more_sigterms`: see Session. Raises Error if the processes cannot be kept running.
    """
    run_dir = run_dir.resolve()
    config = _load_config(run_dir)
    roles.check_joining(names, config)
    console = Console()
    _wait_for_run(run_dir, config, console)
    supervisor = Supervisor(run_dir, config.faults, lambda text: show(console, text))
    session = Session(run_dir, supervisor, config.faults.shutdown_grace_s, ignore_more_sigterms)
    with processes.temporary_folder() as temporary, session.handle_signals():
        try:
            key = controller_key(run_dir)
            session.start(config, names, temporary)
            show(console, f"started {', '.join(names)} for the run in {run_dir}")
            while not session.poll():
                if controller_key(run_dir) != key:
                    key = controller_key(run_dir)
                    show(console, "`run` was started again: restarting the processes here")
                    processes.stop(supervisor.processes, STOP_GRACE_S)
                    left = [name for name in names if not supervisor.children[name].given_up]
                    session.start(config, left, temporary)
                limit_s = config.run.no_progress_timeout_s
                if supervisor.status_age_s > limit_s:
                    raise Error(
                        f"the controller of {run_dir} has written no status for "
                        f"run.no_progress_timeout_s = {limit_s:.0f} s; check the host of `run` "
                        "and join again when it is back"
                    )
                time.sleep(POLL_S)
            session.wait_for_workers()
        finally:
            grace_s = config.faults.shutdown_grace_s if session.preempted else STOP_GRACE_S
            processes.stop(supervisor.processes, grace_s)
    if session.interrupted:
        return 128 + session.interrupted
    if session.preempted:
        return processes.EXIT_REQUEUE
    if supervisor.failed:
        raise Error(session.failure_text())
    show(console, "this host's part of the run is done")
    return 0


def _load_config(run_dir: Path) -> Config:
    path = run_dir / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{run_dir} has no config.yaml: give the run.dir of a run")
    return configuration.load_run(run_dir)


def _wait_for_run(run_dir: Path, config: Config, console: Console) -> None:
    """Waits until the controller listens.

    Raises Error after trainer.start_timeout_s, and at once if the run is complete.
    """
    limit_s = config.trainer.start_timeout_s
    deadline = time.monotonic() + limit_s
    if not _is_running(run_dir):
        show(console, f"waiting for a running controller in {run_dir}")
    while not _is_running(run_dir):
        if _has_finished(run_dir):
            raise Error(
                f"the run in {run_dir} is complete: there is nothing to join",
                "to continue it, use `run` with more run.steps",
            )
        if time.monotonic() > deadline:
            raise Error(
                f"no running controller in {run_dir} within trainer.start_timeout_s = "
                f"{limit_s:.0f} s; start it with `run`"
            )
        time.sleep(POLL_S)


def _is_running(run_dir: Path) -> bool:
    status = find_status(run_dir)
    has_ended = status is None or status.state in FINAL_STATES
    return not has_ended and (run_dir / "controller.address").exists()


def _has_finished(run_dir: Path) -> bool:
    """Returns whether the newest `run` is complete; it makes new keys before a new status."""
    try:
        made = (run_dir / "keys").stat().st_mtime_ns
        written = (run_dir / STATUS_FILE).stat().st_mtime_ns
    except OSError:
        return False
    status = find_status(run_dir)
    return written > made and status is not None and status.state == "finished"
