"""A run with its two pipeline stages on two hosts; a rank, a host and the whole job are lost.

Each host is a network namespace with its own address (chaos_parts/namespaces.py). Run by
test_trainer_hosts.py as `trainer_hosts_main.py MODEL DATASET FOLDER`; fails at the first assertion.
"""

from __future__ import annotations

import signal
import stat
import sys
import time
from pathlib import Path

import msgspec
import psutil
from chaos_parts import namespaces
from hosts import START_S, Host, wait_until
from whole_runs import SHORT_ROLLOUT, RunInputs

from megatron_async_rl.cli import audit
from megatron_async_rl.node.incarnations import FOLDER, TrainerIncarnation
from megatron_async_rl.observability.status import read_status
from megatron_async_rl.storage.checkpoints import list_manifests

ON_B = ("ip", "netns", "exec", "b")


class Job:
    def __init__(self, model: Path, dataset: Path, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.path = RunInputs(model, dataset, dataset).config(
            self.run_dir,
            run={"steps": 5000, "export_every": 0, "host": namespaces.HOST_A}
            | {"dir": str(self.run_dir)},
            evaluation={"sets": {}},
            rollout=SHORT_ROLLOUT,
            faults={"heartbeat_timeout_s": 15, "restart_backoff_s": 0.1, "max_restarts": 3},
            trainer={"hosts": 2, "start_timeout_s": 100},
            megatron={"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2},
            checkpoint={"every": 2},
        )
        self.folder = folder
        self.hosts: list[Host] = []

    def run(self, *overrides: str) -> Host:
        """Starts `run` on host A; the trainer must find the interface between the hosts itself."""
        arguments = ("run", str(self.path), *overrides, "--elsewhere", "rollout-0,trainer-1")
        self.main = self._add(Host(self.folder / "run.out", *arguments))
        return self.main

    def serve(self) -> Host:
        """Starts the server on host A with a launcher of its own; its gloo needs the interface."""
        wait_until(lambda: (self.run_dir / "controller.address").exists())
        arguments = ("join", str(self.run_dir), "rollout-0")
        return self._add(Host(self.folder / "serve.out", *arguments, GLOO_SOCKET_IFNAME="a0"))

    def join(self) -> Host:
        """Starts the second trainer node on host B."""
        wait_until(lambda: (self.run_dir / "controller.address").exists())
        return self._add(
            Host(self.folder / "join.out", "join", str(self.run_dir), "trainer-1", prefix=ON_B)
        )

    def _add(self, host: Host) -> Host:
        self.hosts.append(host)
        return host

    def trained(self, version: int) -> bool:
        assert self.main.process.poll() is None, self.main.log.read_text()[-3000:]
        status = self.run_dir / "status.json"
        return status.exists() and read_status(self.run_dir).version >= version

    def wait_for_steps(self, steps: int = 2) -> None:
        now = read_status(self.run_dir).version
        wait_until(lambda: self.trained(now + steps))

    def incarnations(self) -> list[TrainerIncarnation]:
        files = [self.run_dir / FOLDER / name for name in ("trainer-0", "trainer-1")]
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
        return [msgspec.json.decode(file.read_bytes(), type=TrainerIncarnation) for file in files]

    def check_ledger(self) -> None:
        result = audit.audit(self.run_dir, 3)
        assert result.breaches == [] and result.lost == result.duplicated == 0, result


def command_line(process: psutil.Process) -> list[str]:
    """Returns the command line; empty if the process has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def rank_of(host: Host) -> psutil.Process:
    """Returns the only trainer rank of this launcher."""
    module = "megatron_async_rl.trainer.torchrun"
    (agent,) = (process for process in host.process_tree() if module in command_line(process))
    (rank,) = agent.children()  # which has forks that write checkpoints
    return rank


def main(model: Path, dataset: Path, folder: Path) -> None:
    namespaces.Namespaces(folder / "chaos").make_hosts()
    job = Job(model, dataset, folder)
    began = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:6.1f} s  {text}\n")

    try:
        a = job.run()
        c = job.serve()
        b = job.join()
        wait_until(lambda: job.trained(2))
        say("training")
        first, second = job.incarnations()
        assert (first.number, first.restarts, second.number, second.restarts) == (1, 0, 1, 0)
        assert first.address == namespaces.HOST_A and first.port > 0
        old = [rank_of(a), rank_of(b)]
        old[1].kill()
        # both ranks end, though one was killed
        wait_until(lambda: not any(is_running(rank) for rank in old))
        job.wait_for_steps()
        say("a rank was killed on the second host")
        # counted as one restart, though both nodes lost a rank
        assert [(n.number, n.restarts) for n in job.incarnations()] == [(2, 1), (2, 1)]
        assert rank_of(a) != old[0] and rank_of(b) != old[1]

        b.kill()
        assert b.watch.left() == []
        survivor = rank_of(a)
        b = job.join()
        job.wait_for_steps()
        say("the second host was lost and joined again")
        # a node that notices the loss late is one incarnation behind until it has
        wait_until(lambda: len({n.number for n in job.incarnations()}) == 1)
        assert job.incarnations()[0].number >= 3
        assert not is_running(survivor)

        a.kill()  # with the controller
        assert a.watch.left() == []
        before = job.incarnations()[0].number
        a = job.run()
        job.wait_for_steps()
        say("the first host was lost and restarted; the second joined by itself")
        assert b.process.poll() is None and b.says("`run` was started again")
        assert job.incarnations()[0].number > before and job.incarnations()[0].restarts == 0

        for host in (b, c, a):
            host.process.send_signal(signal.SIGTERM)
        assert [host.process.wait(90) for host in (b, c, a)] == [75, 75, 75]
        assert a.watch.left() == b.watch.left() == c.watch.left() == []
        version = read_status(job.run_dir).version
        assert list_manifests(job.run_dir)[0].version == version  # saved on both hosts
        job.check_ledger()
        say("ended by SIGTERM")

        a = job.run(f"run.steps={version + 2}")
        c = job.serve()
        b = job.join()
        assert [host.process.wait(START_S) for host in (a, b, c)] == [0, 0, 0], a.log.read_text()[
            -2000:
        ]
        status = read_status(job.run_dir)
        assert (status.state, status.version) == ("finished", version + 2)
        assert (job.run_dir / "policy" / "config.json").exists()
        assert a.watch.left() == b.watch.left() == c.watch.left() == []
        job.check_ledger()
        say("finished")
    finally:
        for host in job.hosts:
            host.kill()


if __name__ == "__main__":
    namespaces.enter()
    main(*(Path(argument) for argument in sys.argv[1:]))
