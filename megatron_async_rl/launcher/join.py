"""`join`: starts some processes of a run that another launcher began, from this host, and keeps them alive.

For a run over several hosts, and for a host that is lost: its workers are started here under the same names, or further
ones under new names. Configuration, address and keys come from the run's folder, which all hosts share.

    a name that is in use    the new process takes it over: the controller takes the old one's samples back, answers
                             whatever it still sends with a refusal, and its launcher does not start it again
    a new life of the run    has new keys: our processes are started anew with them
    the run's end            ends this launcher too; so does a controller that is not heard of for run.no_progress_timeout_s
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_async_rl import processes
from megatron_async_rl.config import load as config_module
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError, DataError, Error
from megatron_async_rl.launcher import roles
from megatron_async_rl.launcher.claims import run_key
from megatron_async_rl.launcher.run import GRACE_S, Run, tell
from megatron_async_rl.launcher.supervisor import Supervisor
from megatron_async_rl.observability.run_log import FINAL_STATES, read_status

POLL_S = 0.2


def join(run_dir: Path, names: Sequence[str], patient: bool = False) -> int:
    """Serves the run to its end. Returns the exit code. Raises Error when our processes cannot be kept alive.

    `patient`: see launch.Run.
    """
    run_dir = run_dir.resolve()
    config = _config_of(run_dir)
    roles.check_joining(names, config)
    _wait_for_the_run(run_dir, config)
    console = Console()
    supervisor = Supervisor(run_dir, config.faults, lambda text: tell(console, text))
    run = Run(run_dir, supervisor, config.faults.shutdown_grace_s, patient)
    with run.signals():
        try:
            keys = run_key(run_dir)
            run.start(config, names)
            tell(console, f"{', '.join(names)} started for the run in {run_dir}")
            while not run.over():
                if run_key(run_dir) != keys:
                    keys = run_key(run_dir)
                    tell(console, "the run has begun a new life: its workers here are started anew")
                    processes.stop(supervisor.processes, GRACE_S)
                    run.start(
                        config, [name for name in names if not supervisor.children[name].given_up]
                    )
                if supervisor.silent_s > config.run.no_progress_timeout_s:
                    raise Error(
                        f"the controller of {run_dir} has written no status for run.no_progress_timeout_s = {config.run.no_progress_timeout_s:.0f} s; "
                        "see whether the host of `run` is there, and join again once it is"
                    )
                time.sleep(POLL_S)
            if not supervisor.failed and not run.interrupted and run.preempted_at is None:
                run.wait_for_the_rest()
        finally:
            processes.stop(
                supervisor.processes,
                GRACE_S if run.preempted_at is None else config.faults.shutdown_grace_s,
            )
    if run.interrupted:
        return 128 + run.interrupted
    if run.preempted_at is not None:
        return processes.EXIT_REQUEUE
    if supervisor.failed:
        raise Error(run.why())
    tell(console, "nothing more to do here")
    return 0


def _config_of(run_dir: Path) -> Config:
    path = run_dir / "config.yaml"
    if not path.exists():
        raise ConfigError(
            f"{run_dir} is not the folder of a run: it has no config.yaml; give the run.dir of a run"
        )
    return config_module.load(path)


def _wait_for_the_run(run_dir: Path, config: Config) -> None:
    """Until its controller listens. Raises Error when there is none in time."""
    limit_s = config.trainer.start_timeout_s
    deadline = time.monotonic() + limit_s
    while not _is_on(run_dir):
        if time.monotonic() > deadline:
            raise Error(
                f"the run in {run_dir} is not on: no controller within trainer.start_timeout_s = {limit_s:.0f} s; begin "
                "it with `run`"
            )
        time.sleep(POLL_S)


def _is_on(run_dir: Path) -> bool:
    try:
        return (run_dir / "controller.address").exists() and read_status(
            run_dir
        ).state not in FINAL_STATES
    except DataError:
        return False  # it has written no status yet
