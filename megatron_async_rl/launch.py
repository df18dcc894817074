"""`run`: starts every process of a run on this host, shows how it goes, and ends them all together.

    controller, reward workers, rollout workers (each starts its SGLang server), torchrun (starts the trainer ranks)

The run is complete when the controller and the trainer have both ended well. If any process ends otherwise, all are
stopped and its error line is the run's. Ctrl-C and SIGTERM stop everything too.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console

from megatron_async_rl import config as config_module
from megatron_async_rl import devices, display, doctor, processes
from megatron_async_rl.config import Config
from megatron_async_rl.errors import ConfigError, Error
from megatron_async_rl.metrics import read_status

GRACE_S = 15.0  # from SIGTERM to SIGKILL
LAST_WORDS_S = 20.0  # for the others to end by themselves after controller and trainer have
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class Run:
    """The processes of one run by name, the first that failed, and whether somebody asked to stop."""

    run_dir: Path
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    failed: str = ""
    interrupted: int = 0

    def start(self, name: str, *command: str, env: dict[str, str] | None = None) -> None:
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        child_env = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **(env or {})}
        command = (sys.executable, *command)
        self.children[name] = processes.start(list(command), self.log(name), child_env)

    def log(self, name: str) -> Path:
        return self.run_dir / "logs" / f"{name}.log"

    def over(self) -> bool:
        """Whether there is nothing more to wait for; notes who failed."""
        codes = {name: child.poll() for name, child in self.children.items()}
        if self.interrupted:
            return True
        self.failed = next((name for name, code in codes.items() if code), "")
        return bool(self.failed) or (codes["controller"] == 0 and codes["trainer"] == 0)


def run(config: Config) -> int:
    """Runs to the end. Returns the exit code. Raises Error when the run failed."""
    doctor.preflight(config)
    run_dir = config.run_dir.resolve()
    console = Console()
    with _own(run_dir, console):
        (run_dir / "config.yaml").write_text(config_module.dump(config))
        run = Run(run_dir)
        previous = [signal.signal(s, lambda number, _: setattr(run, "interrupted", number)) for s in _STOP_SIGNALS]
        try:
            _start_all(run, config)
            display.live(run_dir, run.over, console)
            if not run.failed and not run.interrupted:
                _wait_for_the_rest(run)
        finally:
            processes.stop(run.children.values(), GRACE_S)
            for signum, handler in zip(_STOP_SIGNALS, previous, strict=True):
                signal.signal(signum, handler)
        if run.interrupted:
            console.print(f"stopped by {signal.Signals(run.interrupted).name}; what was written is in {run_dir}")
            return 128 + run.interrupted
        if run.failed:
            raise Error(_why(run))
        console.print(display.summary(read_status(run_dir)), highlight=False)
        console.print(f"policy: {run_dir / 'policy'}\nTensorBoard: tensorboard --logdir {run_dir / 'tensorboard'}")
        return 0


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _start_all(run: Run, config: Config) -> None:
    package, run_dir = "megatron_async_rl", str(run.run_dir)
    gpus = devices.assign_gpus(config, devices.visible_gpus())
    run.start("controller", "-m", f"{package}.controller", run_dir)
    for i in range(config.rollout.servers):
        name = f"rollout-{i}"
        run.start(name, "-m", f"{package}.rollout", run_dir, name, env={"CUDA_VISIBLE_DEVICES": gpus[name]})
    run.start(
        "trainer",
        *("-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={config.trainer_ranks}"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--no-python"),
        *(sys.executable, "-m", f"{package}.trainer", run_dir),
        env={
            "CUDA_VISIBLE_DEVICES": gpus["trainer"],
            "OMP_NUM_THREADS": str(config.trainer.threads),
            "NCCL_CUMEM_ENABLE": "0",  # as SGLang sets it
        },
    )
    for i in range(config.reward.workers):
        run.start(f"reward-{i}", "-m", f"{package}.reward", run_dir, f"reward-{i}")


def _wait_for_the_rest(run: Run) -> None:
    """The workers were told to end; whoever is late is stopped."""
    deadline = time.monotonic() + LAST_WORDS_S
    while any(child.poll() is None for child in run.children.values()) and time.monotonic() < deadline:
        time.sleep(0.1)


def _why(run: Run) -> str:
    """The failed process's own error line, else its last words; the first failure names the cause."""
    log = run.log(run.failed)
    code = run.children[run.failed].returncode
    if text := processes.error_text(log):
        return f"{text}\n({run.failed} ended the run; its log: {log})"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""
    return f"{run.failed} ended with exit code {code}; its log: {log}\n{tail}"


@contextmanager
def _own(run_dir: Path, console: Console) -> Iterator[IO[str]]:
    """Makes run_dir this run's own. An earlier run's folder is kept under another name, never written over."""
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
            number = 1
            while (kept := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
                number += 1
            run_dir.rename(kept)
            console.print(f"the earlier run is kept as {kept}")
        run_dir.mkdir(mode=0o700, exist_ok=True)
        (run_dir / "keys").mkdir(mode=0o700)
        yield lock
