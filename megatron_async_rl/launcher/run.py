"""`run`: starts every process of a run on this host, shows its progress and ends them together.

    controller, reward workers, rollout workers (each starts its SGLang server), torchrun (starts
    the trainer ranks)

The run is complete when controller and trainer have ended successfully; a process that dies before
is restarted (supervisor.py). If run.dir has a run, it is resumed from its journal and checkpoints;
--from-scratch renames it instead, --new-if-complete only a complete one. Processes named by
--elsewhere are started on other hosts (join.py).

SIGTERM: no new work is admitted, rollout workers return partial samples, the trainer saves, and
exit code 75 asks to be requeued. Ctrl-C or a second SIGTERM stops at once; finished work is in the
journal either way. Under Slurm, which sends SIGTERM repeatedly, further ones are ignored.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console

from megatron_async_rl import processes
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.warnings import warnings
from megatron_async_rl.data import success_rate
from megatron_async_rl.data.digests import DIGESTS_FILE, changed_data, record_data
from megatron_async_rl.errors import ConfigError, DataError, Error
from megatron_async_rl.launcher import claims, preflight, roles
from megatron_async_rl.launcher.session import Session, show
from megatron_async_rl.launcher.supervisor import Supervisor
from megatron_async_rl.observability import panel, terminal
from megatron_async_rl.observability.sample_log import SAMPLES_FILE
from megatron_async_rl.observability.status import RunStatus, find_status, read_status
from megatron_async_rl.program import command
from megatron_async_rl.storage import hook_digests, model_digests
from megatron_async_rl.storage.hook_digests import HOOKS_FILE
from megatron_async_rl.storage.model_digests import MODEL_FILE

ExistingRun = Literal["resume", "rename", "rename if complete"]
# settings that a journal depends on: a resumed run must not change them
FIXED = (
    "model.path",
    "data.train",
    "data.filter",
    "data.reader",
    "run.seed",
    "run.mode",
    "algorithm.samples_per_prompt",
)


def run(
    config: Config,
    existing: ExistingRun = "resume",
    elsewhere: Collection[str] = (),
    on_owned: Callable[[], None] | None = None,
    ignore_more_sigterms: bool = False,
) -> int:
    """Runs to the end and returns the exit code. Raises Error if the run failed.

    `existing`: whether a run in run.dir is resumed or renamed. `elsewhere`: processes not to start
    here. `on_owned` is called when run.dir belongs to this run and nothing has been started yet.
    `ignore_more_sigterms`: see Session.
    """
    roles.check_joining(elsewhere, config)
    console = Console()
    preflight.preflight(config, elsewhere, lambda text: show(console, text))
    run_dir = config.run_dir.resolve()
    with _owned(run_dir, config, existing, console):
        if _is_complete(run_dir, config):
            show(console, panel.summary(read_status(run_dir)))
            show(
                console,
                f"{run_dir} is complete: raise run.steps to continue, or start over with "
                "--from-scratch",
            )
            return 0
        _make_new_keys(run_dir)
        for warning in [*warnings(config), *_missing_records(run_dir)]:
            show(console, f"warning: {warning}")
        (run_dir / "config.yaml").write_text(configuration.dump(config))
        record_data(run_dir, config)
        model_digests.record(run_dir, config)
        for change in hook_digests.record(run_dir, config):
            show(console, f"warning: {change}")
        success_rate.record(run_dir, config)
        if on_owned:
            on_owned()
        supervisor = Supervisor(run_dir, config.faults, lambda text: show(console, text))
        session = Session(run_dir, supervisor, config.faults.shutdown_grace_s, ignore_more_sigterms)
        with processes.temporary_folder() as temporary, session.handle_signals():
            try:
                here = [name for name in roles.names(config) if name not in elsewhere]
                previous = find_status(run_dir)
                session.start(config, here, temporary)
                _follow(session, console, previous)
                session.wait_for_workers()
            finally:
                session.stop(console)
        if session.interrupted:
            name = signal.Signals(session.interrupted).name
            show(console, f"stopped by {name}; the state of the run is in {run_dir}")
            return 128 + session.interrupted
        if session.preempted:
            show(console, f"preempted; run the same command again to resume from {run_dir}")
            return processes.EXIT_REQUEUE
        if supervisor.failed:
            raise Error(session.failure_text())
        show(console, panel.summary(read_status(run_dir)))
        result = "policy" if config.has_trainer else "batches"
        if config.run.steps:
            show(console, f"{result}: {run_dir / result}")
        show(console, f"metrics: {command('tensorboard', run_dir)}")
        return 0


def _follow(session: Session, console: Console, previous: RunStatus | None) -> None:
    """Shows the run until it is over."""
    while True:
        try:
            terminal.follow(session.run_dir, session.poll, console, previous)
            return
        except OSError:  # a full disk below our output: shown again when there is space
            time.sleep(terminal.POLL_S)


def _is_complete(run_dir: Path, config: Config) -> bool:
    status = find_status(run_dir)
    return bool(status and status.state == "finished" and status.version >= config.run.steps)


def _is_kept(run_dir: Path, config: Config, existing: ExistingRun) -> bool:
    """Returns whether the run in run_dir is resumed; False if it is renamed.

    Raises ConfigError if it cannot be resumed with these settings. A run that has not trained on
    any sample is renamed instead.
    """
    if existing == "rename":
        return False
    _check_nothing_is_missing(run_dir)
    if not (run_dir / "journal.sqlite").exists():
        return False
    if existing == "rename if complete" and _is_complete(run_dir, config):
        return False
    if (changed := _changed_setting(run_dir, config)) and _has_batch(run_dir):
        raise ConfigError(changed)
    return not changed


def _check_nothing_is_missing(run_dir: Path) -> None:
    """Raises DataError if run_dir has a part of a run only, which cannot be resumed."""
    needed = [run_dir / "journal.sqlite", run_dir / "config.yaml"]
    traces = [needed[0], run_dir / "journal.mark", *sorted(run_dir.glob("checkpoints/v*.json"))]
    found = [path for path in traces if path.exists()]
    missing = [path for path in needed if not path.exists()]
    if found and missing:
        raise DataError(
            f"{missing[0]} is missing, but there is {found[-1]}: the run cannot be resumed",
            "restore the file from a copy, or start over with --from-scratch, which keeps the "
            "folder under another name",
        )


def _missing_records(run_dir: Path) -> Iterator[str]:
    """Yields a text for each file of an earlier start with which this one cannot be compared."""
    if (run_dir / "journal.sqlite").exists():
        for name, kind in (
            (DIGESTS_FILE, "datasets"),
            (MODEL_FILE, "files of the model"),
            (HOOKS_FILE, "functions of your own"),
        ):
            if not (run_dir / name).exists():
                yield (
                    f"{run_dir / name} is missing; lost: whether the {kind} are those of the last "
                    "start; it is written again"
                )


def _has_batch(run_dir: Path) -> bool:
    """Returns whether the trainer was given any samples."""
    samples = run_dir / SAMPLES_FILE
    return samples.exists() and samples.stat().st_size > 0


def _changed_setting(run_dir: Path, config: Config) -> str:
    """Returns which setting changed that the run's journal depends on; empty if none did."""
    previous = configuration.load_run(run_dir)
    for key in FIXED:
        old, new = (msgspec.to_builtins(c.value(key)) for c in (previous, config))
        if old != new:
            return (
                f"{key} = {new!r}, but the run in {run_dir} was started with {old!r}; restore the "
                "value, choose another run.dir, or start over with --from-scratch"
            )
    return changed_data(run_dir, config) or model_digests.changed(run_dir, config)


@contextmanager
def _owned(
    run_dir: Path, config: Config, existing: ExistingRun, console: Console
) -> Iterator[None]:
    """Locks run_dir and prepares it: keeps the run in it, or renames it; overwrites nothing."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with claims.lock_path(run_dir).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown process"
            raise ConfigError(
                f"run.dir = {run_dir} is in use by another run ({owner}); stop it, or choose "
                "another run.dir"
            ) from None
        with contextlib.suppress(OSError):  # a full disk
            lock.truncate(0)
            # unbuffered: what a buffer still has is written, and may fail, when the run has ended
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        if run_dir.exists() and any(run_dir.iterdir()):
            if _is_kept(run_dir, config, existing):
                show(console, f"resuming the run in {run_dir}")
            else:
                _rename_old(run_dir, console)
        run_dir.mkdir(mode=0o700, exist_ok=True)
        yield


def _make_new_keys(run_dir: Path) -> None:
    """Removes keys and address: no process of an earlier start can take part in this run."""
    shutil.rmtree(run_dir / "keys", ignore_errors=True)
    (run_dir / "controller.address").unlink(missing_ok=True)
    (run_dir / "keys").mkdir(mode=0o700)


def _rename_old(run_dir: Path, console: Console) -> None:
    number = 1
    while (renamed := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(renamed)
    show(console, f"the earlier run was renamed to {renamed}")
