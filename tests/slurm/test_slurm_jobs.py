"""Whole jobs through launchers/slurm.sbatch on a real Slurm.

Two nodes share this machine and its loopback (tools/slurm_local.sh) and train a tiny model on the
CPU: to the end, through a preemption, through the loss of a node, and cancelled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from needs import needs_engine
from paths import ROOT, SUPPORT
from tiny_model import make_dataset, make_model
from whole_runs import SHORT_ROLLOUT, RunInputs, assert_no_process_left

from megatron_async_rl.cli import audit
from megatron_async_rl.observability.status import RunStatus, read_status
from megatron_async_rl.storage import checkpoints

CLUSTER = ROOT / "tools" / "slurm_local.sh"
MISSING = [
    name
    for name in ("munged", "slurmctld", "slurmd", "sbatch")
    if not shutil.which(name, path=os.defpath + ":/usr/sbin")
]
TIMEOUT_S = 240.0
ENDLESS = 5000  # steps of a job that is stopped before its end

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"no {', '.join(MISSING)}: apt-get install slurmctld slurmd slurm-client munge",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root"),
    needs_engine,
]


@dataclass
class Job:
    """A run submitted to the cluster."""

    folder: Path
    env: dict[str, str]
    number: str = ""

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def output(self) -> str:
        return (self.folder / "job.out").read_text(errors="replace")

    def ends_of_logs(self) -> str:
        """Returns what controller and trainer logged last."""
        logs = (self.run_dir / "logs" / f"{name}.log" for name in ("controller", "trainer"))
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in logs)

    def slurm(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def submit(self, *settings: str) -> Job:
        options = (
            "--parsable",
            "--nodes=2",
            "--gpus-per-node=2",
            f"--output={self.folder / 'job.out'}",
        )
        path = str(self.run_dir.with_suffix(".yaml"))
        self.number = self.slurm("sbatch", *options, "launchers/slurm.sbatch", path, *settings)
        return self

    def cancel(self) -> None:
        """Cancels the job, if it has not ended, until it has left the nodes."""

        def has_ended() -> bool:
            subprocess.run(["scancel", self.number], env=self.env, capture_output=True, timeout=60)
            queued = self.slurm("squeue", "--noheader", "--format=%A")
            return self.number not in queued.split()

        self.wait(has_ended)

    def job_field(self, key: str) -> str:
        match = re.search(rf"\b{key}=(\S+)", self.slurm("scontrol", "show", "job", self.number))
        return match[1] if match else ""

    def status(self) -> RunStatus:
        return read_status(self.run_dir) if (self.run_dir / "status.json").exists() else RunStatus()

    def wait(self, what: Callable[[], bool], limit_s: float = TIMEOUT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not what():
            assert time.monotonic() < deadline, (self.job_field("JobState"), self.output[-3000:])
            time.sleep(0.2)

    def wait_for_version(self, version: int) -> None:
        self.wait(lambda: self.status().version >= version and self.status().state == "training")

    def wait_for_end(self) -> tuple[str, str]:
        """Returns Slurm's state of the job, and its exit code."""
        self.wait(lambda: self.job_field("JobState") not in ("PENDING", "RUNNING", "COMPLETING"))
        assert_no_process_left(self.run_dir)
        return self.job_field("JobState"), self.job_field("ExitCode")

    def check_ledger(self, epochs: int) -> None:
        result = audit.audit(self.run_dir, 3)
        assert (
            result.breaches == []
            and result.lost == result.duplicated == 0
            and result.epochs == epochs
        ), result


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Starts a cluster; returns the environment variables of its clients.

    Each node has two GPUs, which a run on the CPU does not use.
    """
    folder = tmp_path_factory.mktemp("slurm")
    up = subprocess.run(
        ["bash", str(CLUSTER), "up", str(folder), "2", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    try:
        assert up.returncode == 0, up.stderr
        yield {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([os.environ["PATH"], "/usr/sbin"]),
            "PYTHONPATH": str(SUPPORT),  # for the reward function
            "MEGATRON_ASYNC_RL_PYTHON": sys.executable,
        }
    finally:
        started = [int(line.split()[0]) for line in (folder / "pids").read_text().splitlines()]
        subprocess.run(["bash", str(CLUSTER), "down", str(folder)], timeout=90, check=True)
        assert not any(Path(f"/proc/{pid}").exists() for pid in started)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> RunInputs:
    folder = tmp_path_factory.mktemp("inputs")
    dataset = make_dataset(folder / "train.jsonl", 20)
    return RunInputs(make_model(folder / "model"), dataset, dataset)


@pytest.fixture
def job(cluster: dict[str, str], inputs: RunInputs, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    submitted = Job(tmp_path, cluster)

    def make(steps: int, **sections: dict[str, Any]) -> Job:
        standard: dict[str, dict[str, Any]] = {
            "run": {"steps": steps, "export_every": 0},
            "evaluation": {"sets": {}},
            "rollout": SHORT_ROLLOUT,
            "megatron": {"tensor_model_parallel_size": 1},
            "checkpoint": {"every": 4},
        }
        inputs.config(submitted.run_dir, **(standard | sections))
        return submitted

    yield make
    if submitted.number:  # in whatever state a failed test left it, also about to be requeued
        submitted.cancel()


def test_trainer_on_two_nodes_finishes(job: Callable[..., Job]) -> None:
    stages = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2}
    running = job(4, trainer={"hosts": 2}, megatron=stages).submit()
    assert running.wait_for_end() == ("COMPLETED", "0:0"), running.output[-3000:]
    assert running.job_field("Restarts") == "0" and "is requeued" not in running.output
    assert (
        "1: started trainer-1 for the run" in running.output
        and "1: this host's part of the run is done" in running.output
    )
    status = running.status()
    assert (status.state, status.version, status.ledger["trained"]) == ("finished", 4, 16)
    assert (running.run_dir / "policy" / "config.json").exists()
    running.check_ledger(epochs=1)

    again = running.submit()  # the run is complete: neither node waits for the other
    assert again.wait_for_end() == ("COMPLETED", "0:0")
    assert "raise run.steps to continue" in again.output


@pytest.mark.parametrize("cause", ["time limit", "preemption", "every process twice"])
def test_terminated_job_saves_is_requeued_and_continues(
    job: Callable[..., Job], cause: str
) -> None:
    """At the time limit Slurm signals the batch script, at a preemption every process."""
    running = job(ENDLESS).submit()
    running.wait_for_version(2)  # its server is on the second node
    started = running.status().pid
    far = running.status().version + 300
    job(far)  # what the requeued job reads if it starts before the next change
    if cause == "preemption":
        running.slurm(
            "sbatch",
            "--partition=urgent",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=true",
        )
    else:
        running.slurm("scancel", "--batch", "--signal=TERM", running.number)
    if cause == "every process twice":
        running.slurm("scancel", "--signal=TERM", running.number)
    signalled_at = time.monotonic()
    running.wait(lambda: running.job_field("Restarts") == "1")
    # less than faults.shutdown_grace_s and the partition's GraceTime: no process had to be killed
    assert time.monotonic() - signalled_at < 55
    stopped = running.status()
    assert stopped.state == "stopped" and not Path(f"/proc/{started}").exists()
    manifests = checkpoints.list_manifests(running.run_dir)
    assert manifests, running.ends_of_logs()
    saved = manifests[0].version
    assert saved == stopped.version  # saved at SIGTERM, not at a fourth step
    job(saved + 2)  # the requeued job reads the new run.steps
    assert "exit code 75: job" in running.output and "stopped by SIGTERM" not in running.output

    assert running.wait_for_end() == ("COMPLETED", "0:0"), running.output[-3000:]
    assert running.job_field("Restarts") == "1"
    assert running.status().version in (saved + 2, far)
    assert (
        f"loaded checkpoint v{saved:06d}" in (running.run_dir / "logs" / "trainer.log").read_text()
    )
    assert [path.name for path in running.folder.glob(".run.job-*")] == [
        f".run.job-{running.number}.0.1"
    ]
    running.check_ledger(epochs=2)


def test_job_that_loses_a_node_is_requeued_and_continues(job: Callable[..., Job]) -> None:
    running = job(ENDLESS).submit()
    running.wait_for_version(2)
    running.wait(lambda: bool(checkpoints.list_manifests(running.run_dir)))
    started = running.status().pid
    # the node returns as soon as its slurmd registers again
    running.slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    running.wait(lambda: running.job_field("Restarts") == "1")
    far = running.status().version + 200  # the lost job trains on until it is killed
    job(far)
    running.wait(lambda: not Path(f"/proc/{started}").exists())
    near = running.status().version + 20
    job(near)
    # the requeued job reads the new run.steps when it starts
    assert running.wait_for_end() == ("COMPLETED", "0:0"), running.output[-3000:]
    assert running.job_field("Restarts") == "1" and running.status().version in (near, far)
    running.check_ledger(epochs=2)


def test_cancelled_job_ends_cleanly_and_is_not_requeued(job: Callable[..., Job]) -> None:
    running = job(ENDLESS).submit()
    running.wait_for_version(2)
    running.slurm("scancel", running.number)
    state, _ = running.wait_for_end()
    assert state == "CANCELLED" and running.job_field("Restarts") == "0"


def test_job_that_cannot_start_fails_on_all_nodes_without_requeue(
    job: Callable[..., Job],
) -> None:
    running = job(4).submit("model.path=nowhere")
    state, code = running.wait_for_end()
    assert (state, code) == ("FAILED", "2:0") and running.job_field("Restarts") == "0"
    assert "0: error: model.path = nowhere: no such folder" in running.output
    assert "1: n1 did not start the run" in running.output
