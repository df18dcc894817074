"""`run`: starts every process of a run on this host, shows how it goes, and ends them all together.

    controller, reward workers, rollout workers (each starts its SGLang server), torchrun (starts the trainer ranks)

The run is complete when the controller and the trainer have both ended well; who dies before is started again
(supervise.py). A run.dir with a run in it is gone on with, from its journal and checkpoints; --from-scratch keeps it aside.
Processes named by --elsewhere are left to other hosts (join.py).

SIGTERM: nothing new is started, rollouts are handed in, the trainer saves, and the exit code asks to be requeued (75).
Ctrl-C, or a second SIGTERM, stops at once; the journal holds what was finished either way. Under Slurm, which says the
same in several ways, SIGTERM means the first however often it comes.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from rich.console import Console

from megatron_async_rl import processes
from megatron_async_rl.config import load as config_module
from megatron_async_rl.config.checks import cross_host_parallelism_warning
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError, DataError, Error
from megatron_async_rl.launcher import preflight, roles
from megatron_async_rl.launcher.supervisor import Child, Supervisor
from megatron_async_rl.observability import terminal
from megatron_async_rl.observability.run_log import read_status

GRACE_S = 15.0  # from SIGTERM to SIGKILL
LAST_WORDS_S = 20.0  # for the others to end by themselves after controller and trainer have
# a run's journal depends on them
FIXED = ("model.path", "data.train", "run.seed", "run.mode", "algorithm.samples_per_prompt")


@dataclass
class Run:
    """The processes of one run, and whether somebody asked to stop."""

    run_dir: Path
    supervisor: Supervisor
    grace_s: float
    patient: bool = False  # a second SIGTERM says no more than the first
    interrupted: int = 0  # the signal that ends the run at once
    preempted_at: float | None = None

    def start(self, config: Config, names: Collection[str]) -> None:
        for name, command in roles.commands(config, self.run_dir, names).items():
            start = partial(
                processes.start,
                command.arguments,
                self.log(name),
                command.env,
                sigterm_blocked=command.sigterm_blocked,
            )
            self.supervisor.start(name, start)

    def log(self, name: str) -> Path:
        return self.run_dir / "logs" / f"{name}.log"

    def signalled(self, number: int, _: object) -> None:
        if number == signal.SIGTERM and self.preempted_at is None:
            self.preempted_at = time.monotonic()
            children = self.supervisor.children
            told = [children["controller"]] if "controller" in children else self.beside_trainers()
            for child in told:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(signal.SIGTERM)
        elif number != signal.SIGTERM or not self.patient:
            self.interrupted = number

    def beside_trainers(self) -> list[Child]:
        """The workers that need not wait for the trainer on this host to save; none without one."""
        children = self.supervisor.children.values()
        return [child for child in children if child.role != "trainer" and self.supervisor.trainers]

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM come to us while it lasts."""
        previous = {
            number: signal.signal(number, self.signalled)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def wait_for_the_rest(self) -> None:
        """The workers were told to end; whoever is late is stopped."""
        deadline = time.monotonic() + LAST_WORDS_S
        while (
            any(child.poll() is None for child in self.supervisor.processes)
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)

    def why(self) -> str:
        """The failed process's own error line, else its last words; the first failure names the cause."""
        supervisor, failed = self.supervisor, self.supervisor.failed
        log = self.log(failed)
        lead = f"{supervisor.why}; the last time: " if supervisor.why else ""
        code = supervisor.children[failed].last_code
        if text := processes.error_text(log):
            return f"{lead}{text}\n({failed} ended the run; its log: {log})"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""
        return f"{lead}{failed} ended with exit code {code}; its log: {log}\n{tail}"

    def over(self) -> bool:
        if self.interrupted:
            return True
        if self.preempted_at is None:
            return self.supervisor.over()
        last = self.supervisor.processes
        if (
            "controller" not in self.supervisor.children
        ):  # if it was told too, the trainer saves, on all hosts
            last = [trainer.process for trainer in self.supervisor.trainers]
        ended = all(process.poll() is not None for process in last)
        return ended or time.monotonic() - self.preempted_at > self.grace_s


def run(
    config: Config,
    from_scratch: bool = False,
    elsewhere: Collection[str] = (),
    begun: Callable[[], None] | None = None,
    patient: bool = False,
) -> int:
    """Runs to the end. Returns the exit code. Raises Error when the run failed.

    `elsewhere`: not started here. `begun` is called once the folder is this run's, before anything is started.
    `patient`: see Run.
    """
    roles.check_joining(elsewhere, config)
    preflight.preflight(config)
    run_dir = config.run_dir.resolve()
    console = Console()
    with _own(run_dir, config, from_scratch, console):
        if _is_complete(run_dir, config):
            console.print(terminal.summary(read_status(run_dir)), highlight=False)
            console.print(
                f"{run_dir} is complete: raise run.steps to go on, or begin anew with --from-scratch"
            )
            return 0
        if warning := cross_host_parallelism_warning(config):
            console.print(f"warning: {warning}", highlight=False)
        (run_dir / "config.yaml").write_text(config_module.dump(config))
        if begun:
            begun()
        supervisor = Supervisor(run_dir, config.faults, lambda text: tell(console, text))
        run = Run(run_dir, supervisor, config.faults.shutdown_grace_s, patient)
        with run.signals():
            try:
                run.start(config, [name for name in roles.names(config) if name not in elsewhere])
                _follow(run, console)
                if not run.supervisor.failed and not run.interrupted and run.preempted_at is None:
                    run.wait_for_the_rest()
            finally:
                processes.stop(
                    run.supervisor.processes, GRACE_S if run.preempted_at is None else 0.0
                )
        if run.interrupted:
            console.print(
                f"stopped by {signal.Signals(run.interrupted).name}; what was written is in {run_dir}"
            )
            return 128 + run.interrupted
        if run.preempted_at is not None:
            console.print(f"told to end; run it again to go on from what is in {run_dir}")
            return processes.EXIT_REQUEUE
        if run.supervisor.failed:
            raise Error(run.why())
        console.print(terminal.summary(read_status(run_dir)), highlight=False)
        result = (
            f"policy: {run_dir / 'policy'}"
            if config.has_trainer
            else f"batches: {run_dir / 'batches'}"
        )
        console.print(f"{result}\nTensorBoard: tensorboard --logdir {run_dir / 'tensorboard'}")
        return 0


def tell(console: Console, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk under our output is no reason to end a run
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def _follow(run: Run, console: Console) -> None:
    """Shows the run until it is over."""
    while True:
        try:
            terminal.live(run.run_dir, run.over, console)
            return
        except OSError:  # as above: shown again when there is room
            time.sleep(terminal.POLL_S)


def _is_complete(run_dir: Path, config: Config) -> bool:
    try:
        status = read_status(run_dir)
    except DataError:
        return False
    return status.state == "finished" and status.version >= config.run.steps


def _check_same_run(run_dir: Path, config: Config) -> None:
    """Raises ConfigError when a setting changed that the run's journal depends on."""
    before = config_module.load(run_dir / "config.yaml")
    for key in FIXED:
        section, name = key.split(".")
        was, now = (getattr(getattr(c, section), name) for c in (before, config))
        if was != now:
            raise ConfigError(
                f"{key} = {now!r}, but the run in {run_dir} began with {was!r}; put it back, choose another run.dir, or begin "
                "anew with --from-scratch"
            )


@contextmanager
def _own(run_dir: Path, config: Config, from_scratch: bool, console: Console) -> Iterator[IO[str]]:
    """Makes run_dir this run's own: goes on with the run in it, or keeps that aside, never written over."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    lock_path = run_dir.with_name(f".{run_dir.name}.lock")
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"run.dir = {run_dir} is in use by another run; stop it, or choose another run.dir"
            ) from None
        if run_dir.exists() and any(run_dir.iterdir()):
            has_run = (run_dir / "journal.sqlite").exists() and (run_dir / "config.yaml").exists()
            if has_run and not from_scratch:
                _check_same_run(run_dir, config)
                console.print(f"going on with the run in {run_dir}")
            else:
                _keep_aside(run_dir, console)
        run_dir.mkdir(mode=0o700, exist_ok=True)
        # keys and address are made anew: nobody of an earlier start is left to use them
        shutil.rmtree(run_dir / "keys", ignore_errors=True)
        (run_dir / "controller.address").unlink(missing_ok=True)
        (run_dir / "keys").mkdir(mode=0o700)
        yield lock


def _keep_aside(run_dir: Path, console: Console) -> None:
    number = 1
    while (kept := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(kept)
    console.print(f"the earlier run is kept as {kept}")
