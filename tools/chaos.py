"""Faults against a running job of real processes, then the books counted anew from its journal.

    python tools/chaos.py CONFIG RUN_DIR [--faults F1,F4,...] [--rounds 2] [--seed 1] [key=value ...]

One job is started and goes on through all faults, `rounds` times each at random instants; a fault is survived when the
job trains a further version after it. A line per fault:

    fault=F1 injected=2 survived=2 recover_p50=.. recover_p95=.. what=...

and at the end `megatron_async_rl audit` over the whole run. Exit code 1 when a fault was not survived or a promise broken.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_async_rl import audit, checkpoints
from megatron_async_rl.config import load
from megatron_async_rl.errors import DataError
from megatron_async_rl.metrics import read_status

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS = (  # limits that a test can wait for
    "faults.silence_s=8",
    "faults.backoff_s=0.2",
    "faults.max_restarts=50",
    "rollout.lease_timeout_s=20",
    "weights.update_timeout_s=15",
    "checkpoint.every=2",
)
NEWS_S = 1.5
SETTLE_S = 2.0  # of undisturbed training between faults, and a random time on top


@dataclass
class Job:
    config: Path
    run_dir: Path
    overrides: list[str]
    random: random.Random
    recover_limit_s: float
    process: subprocess.Popen[bytes] | None = None
    results: dict[str, list[float | None]] = field(default_factory=dict)

    def start(self, *arguments: str) -> None:
        with self.run_dir.with_suffix(".out").open("ab") as output:
            command = [sys.executable, "-m", "megatron_async_rl", "run", *arguments, str(self.config)]
            self.process = subprocess.Popen(
                [*command, f"run.dir={self.run_dir}", *SETTINGS, *self.overrides],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
            )

    @property
    def version(self) -> int:
        status = read_status(self.run_dir)
        return status.version if status.state == "training" else -1

    def wait_for_version(self, version: int, limit_s: float) -> float | None:
        """Seconds until the job has trained so far; None when it does not come to it."""
        started = time.monotonic()
        while time.monotonic() - started < limit_s:
            with contextlib.suppress(Exception):  # status.json may not be there yet
                if self.version >= version:
                    return time.monotonic() - started
            if self.process is None or self.process.poll() is not None:
                return None
            time.sleep(0.1)
        return None

    def find(self, *words: str) -> list[psutil.Process]:
        """This job's processes with all these words on their command line."""
        assert self.process
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    line = " ".join(process.cmdline())
                    if all(word in line for word in words):
                        found.append(process)
        return found

    def one(self, *words: str) -> psutil.Process:
        deadline = time.monotonic() + 60
        while not (found := self.find(*words)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.random.choice(found)

    def wait_for_update(self) -> None:
        """Returns while a server is taking weights in, or after ten seconds."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                if any(server.state == "updating" for server in read_status(self.run_dir).fleet):
                    return
            time.sleep(0.01)


def f1_rollout_worker_dies(job: Job) -> None:
    job.one("megatron_async_rl.rollout").kill()


def f1_server_dies(job: Job) -> None:
    job.one("--model-path").kill()


def f2_rollout_worker_hangs(job: Job) -> None:
    job.one("megatron_async_rl.rollout").suspend()


def f2_worker_answers_late(job: Job) -> None:
    """Silent until it has lost its leases, then it goes on as if nothing had been."""
    process = job.one("megatron_async_rl.rollout")
    process.suspend()
    time.sleep(10)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.resume()


def f3_server_is_slow(job: Job) -> None:
    process = job.one("--model-path")
    for _ in range(20):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
            time.sleep(0.4)
            process.resume()
        time.sleep(0.1)


def f4_trainer_rank_dies(job: Job) -> None:
    job.one("megatron_async_rl.trainer").kill()


def f5_server_hangs_in_update(job: Job) -> None:
    job.wait_for_update()
    for process in job.find("sglang") or job.find("--model-path"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()


def f6_controller_dies(job: Job) -> None:
    job.one("megatron_async_rl.controller").kill()


def f7_reward_worker_dies(job: Job) -> None:
    job.one("megatron_async_rl.reward").kill()


def f9_server_dies_in_update(job: Job) -> None:
    job.wait_for_update()
    job.one("--model-path").kill()


def f10_disk_full(job: Job) -> None:
    """The folder's file system has no room for some seconds (RUN_DIR must be on a small one of its own)."""
    filler = job.run_dir / "filler"
    if os.statvfs(job.run_dir).f_blocks * os.statvfs(job.run_dir).f_frsize > 1 << 30:
        raise SystemExit("F10 fills the disk: put RUN_DIR on a file system of its own of less than 1 GiB")
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    time.sleep(6)
    filler.unlink()


def f11_checkpoint_is_damaged(job: Job) -> None:
    """One byte of the newest checkpoint flips; then the trainer needs it."""
    manifest = checkpoints.manifests(job.run_dir)[0]
    name = next(name for name in sorted(manifest.files) if name.endswith(".distcp"))
    with (job.run_dir / checkpoints.FOLDER / manifest.folder / name).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    f4_trainer_rank_dies(job)


def f12_preempted(job: Job) -> int:
    """SIGTERM to the whole job, as Slurm sends it; it is requeued by its exit code. The version at which it ended."""
    assert job.process
    job.process.send_signal(signal.SIGTERM)
    code = job.process.wait(90)
    if code != 75:
        raise RuntimeError(f"exit code {code} instead of 75")
    ended_at = read_status(job.run_dir).version
    job.start()
    return ended_at


FAULTS: dict[str, tuple[Callable[[Job], int | None], ...]] = {
    "F1": (f1_rollout_worker_dies, f1_server_dies),
    "F2": (f2_rollout_worker_hangs, f2_worker_answers_late),
    "F3": (f3_server_is_slow,),
    "F4": (f4_trainer_rank_dies,),
    "F5": (f5_server_hangs_in_update,),
    "F6": (f6_controller_dies,),
    "F7": (f7_reward_worker_dies,),
    "F9": (f9_server_dies_in_update,),
    "F10": (f10_disk_full,),
    "F11": (f11_checkpoint_is_damaged,),
    "F12": (f12_preempted,),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--faults", default=",".join(f for f in FAULTS if f != "F10"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--recover-limit-s", type=float, default=120.0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    job = Job(
        arguments.config,
        arguments.run_dir.resolve(),
        arguments.overrides,
        random.Random(arguments.seed),
        arguments.recover_limit_s,
    )
    chosen = [name for name in arguments.faults.split(",") if name in FAULTS]
    unknown = set(arguments.faults.split(",")) - set(chosen)
    if unknown:
        parser.error(f"unknown faults {sorted(unknown)}; known: {', '.join(FAULTS)}")
    job.start("--from-scratch")
    try:
        survived = _inject_all(
            job, [(name, f) for name in chosen for f in FAULTS[name] for _ in range(arguments.rounds)]
        )
        assert job.process
        job.process.send_signal(signal.SIGTERM)
        job.process.wait(90)
    finally:
        if job.process and job.process.poll() is None:
            job.process.kill()
    return int(not survived) | audit.run(job.run_dir, load(job.run_dir / "config.yaml").staleness.eta)


def _inject_all(job: Job, plan: list[tuple[str, Callable[[Job], int | None]]]) -> bool:
    if job.wait_for_version(2, 300) is None:
        raise SystemExit(f"the job did not start; see {job.run_dir.with_suffix('.out')}")
    for name, inject in plan:
        time.sleep(SETTLE_S + job.random.random() * 2)
        before = job.version
        before = inject(job) or before
        started = time.monotonic()
        time.sleep(NEWS_S)  # until status.json tells what was trained before the fault
        with contextlib.suppress(DataError):
            before = max(before, job.version)
        # one version may have been under way already: the second was begun after the fault
        waited = job.wait_for_version(before + 2, job.recover_limit_s)
        took = None if waited is None else time.monotonic() - started
        job.results.setdefault(f"{name} {inject.__name__}", []).append(took)
        print(f"# {inject.__name__} at version {before}: {took and round(took, 1)} s", flush=True)
        if took is None:
            print(f"# not survived after {time.monotonic() - started:.0f} s; see {job.run_dir}", flush=True)
            break
    for key, times in job.results.items():
        name, what = key.split()
        good = sorted(t for t in times if t is not None)
        p50 = f"{statistics.median(good):.1f}s" if good else "-"
        p95 = f"{good[min(len(good) - 1, round(0.95 * (len(good) - 1)))]:.1f}s" if good else "-"
        numbers = f"injected={len(times)} survived={len(good)} recover_p50={p50} recover_p95={p95}"
        print(f"fault={name} {numbers} what={what.partition('_')[2]}")
    return all(None not in times for times in job.results.values())


if __name__ == "__main__":
    sys.exit(main())
