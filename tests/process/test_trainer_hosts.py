"""A trainer with ranks on several hosts.

The incarnations that its nodes agree on, over processes of one line each, and a whole run over two
network namespaces (trainer_hosts_main.py).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from config_builders import config_tree
from needs import needs_engine, needs_network_namespaces
from paths import ROOT, SUPPORT, TOOLS
from tiny_model import make_dataset, make_model

from megatron_async_rl import addresses
from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.warnings import cross_host_parallelism_warning
from megatron_async_rl.controller.monitoring.watchdog import dump_stacks
from megatron_async_rl.errors import ConfigError, Error
from megatron_async_rl.launcher import roles, torchrun
from megatron_async_rl.launcher.claims import Claims
from megatron_async_rl.launcher.gpus import assign_gpus
from megatron_async_rl.node import incarnations, node
from megatron_async_rl.node.incarnations import FOLDER, IncarnationFiles, TrainerIncarnation
from megatron_async_rl.observability.status import STATUS_FILE, RunStatus

SLEEP = "import time; time.sleep(600)"


def config_with(**sections: Any) -> Config:
    return load.from_tree(config_tree(rollout={"max_new_tokens": 8}, **sections))


def test_hosts_hold_equally_many_ranks() -> None:
    four = config_with(
        trainer={"hosts": 4, "data_parallel_size": 4}, megatron={"tensor_model_parallel_size": 2}
    )
    assert (
        four.trainer_names == ["trainer-0", "trainer-1", "trainer-2", "trainer-3"]
        and four.ranks_per_host == 2
    )
    with pytest.raises(
        ConfigError,
        match=r"trainer\.hosts = 3 does not divide the 4 trainer ranks .* one of 1, 2, 4,",
    ):
        config_with(trainer={"hosts": 3, "data_parallel_size": 4})
    assert config_with(trainer={"data_parallel_size": 4}).trainer_names == ["trainer"]
    recorded = config_with(
        run={"dir": "unused", "steps": 1, "mode": "rollout_only"},
        trainer={"hosts": 2, "data_parallel_size": 2},
    )
    assert recorded.trainer_names == ["trainer"]  # the recorder is one process


@pytest.mark.parametrize(
    ("hosts", "tp", "cp", "warned"),
    [(1, 4, 2, ""), (2, 4, 2, ""), (4, 4, 2, "context"), (8, 4, 1, "tensor_model"), (2, 2, 1, "")],
)
def test_tensor_or_context_group_across_hosts_is_warned_about(
    hosts: int, tp: int, cp: int, warned: str
) -> None:
    sizes = {"tensor_model_parallel_size": tp, "context_parallel_size": cp}
    text = cross_host_parallelism_warning(
        config_with(trainer={"hosts": hosts, "data_parallel_size": 16 // tp // cp}, megatron=sizes)
    )
    assert text.startswith(f"megatron.{warned}_parallel_size") if warned else text == ""


def test_each_host_gets_a_name_a_command_and_its_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config_with(trainer={"hosts": 2, "data_parallel_size": 4})
    assert roles.names(settings) == [
        "controller",
        "rollout-0",
        "trainer-0",
        "trainer-1",
        "reward-0",
    ]
    roles.check_joining(["trainer-1"], settings)
    for name in ("trainer", "trainer-2"):
        with pytest.raises(
            ConfigError,
            match=r"expected rollout-N, reward-N or trainer-0 or trainer-1; trainer\.hosts = 2",
        ):
            roles.check_joining([name], settings)
    gpus = list("abcde")
    assert assign_gpus(settings, gpus, ["trainer-1", "rollout-0"]) == {
        "trainer-1": "a,b",
        "rollout-0": "c",
    }
    assert assign_gpus(settings, gpus, roles.names(settings)) == {
        "trainer-0": "a,b",
        "trainer-1": "c,d",
        "rollout-0": "e",
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    command = roles.commands(settings, Path("/run"), ["trainer-1"])["trainer-1"]
    assert command.arguments[-3:] == ["megatron_async_rl.node", "/run", "trainer-1"]
    assert command.env["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert "--nproc-per-node=2" in torchrun.command(2, [], "module")


def test_reserved_port_is_exclusive_and_its_interface_is_found() -> None:
    with addresses.reserve_port("127.0.0.1") as held:
        port = held.getsockname()[1]
        child = "import socket, sys\nwith socket.socket() as s:\n s.bind(('', int(sys.argv[1])))"
        taken = subprocess.run(
            [sys.executable, "-c", child, str(port)], capture_output=True, timeout=30, check=False
        )
        assert b"Address already in use" in taken.stderr
        store = (
            "import sys, datetime\n"
            "from megatron_async_rl.weights.update_group import listening_store\n"
            "timeout = datetime.timedelta(seconds=20)\n"
            "listening_store('127.0.0.1', int(sys.argv[1]), 1, timeout).set('key', 'value')"
        )
        assert (
            subprocess.run(
                [sys.executable, "-c", store, str(port)], timeout=60, check=False
            ).returncode
            == 0
        )
    assert addresses.own_address("tcp://127.0.0.1:5") == "127.0.0.1"
    assert addresses.interface_of("127.0.0.1") == "lo" and addresses.interface_of("192.0.2.1") == ""


def test_newest_record_wins_and_incarnations_never_decrease(tmp_path: Path) -> None:
    first, second = (
        IncarnationFiles(tmp_path, f"trainer-{i}", ["trainer-0", "trainer-1"]) for i in range(2)
    )
    first.write(TrainerIncarnation(3, 1, "a"))
    second.write(TrainerIncarnation(3, 2, "b"))
    assert first.read().restarts == 2 and first.missing() == []
    first.write(TrainerIncarnation(4, 3))
    assert (
        second.read().number == 4
        and second.missing() == []
        and first.read().number == 4
        and first.missing() == ["trainer-1"]
    )
    second.write(TrainerIncarnation(4, 3, "over", failed=True))
    assert first.read().reason == "over"
    assert first.silent(100) == [] and first.silent(-1) == ["trainer-1"]
    second.write(TrainerIncarnation(4, done=True))
    first.read()
    assert first.silent(-1) == []  # it has finished


def test_record_that_cannot_be_read_keeps_its_last_content(tmp_path: Path) -> None:
    """A network file system returns errors now and then; they must not restart the trainer."""
    first, second = (
        IncarnationFiles(tmp_path, f"trainer-{i}", ["trainer-0", "trainer-1"]) for i in range(2)
    )
    second.write(TrainerIncarnation(3, 1, "a"))
    assert first.read().number == 3
    (tmp_path / FOLDER / "trainer-1").unlink()
    (tmp_path / FOLDER / "trainer-1").mkdir()  # reading it raises an OSError
    assert first.read().number == 3
    assert first.silent(-1) == ["trainer-1"]  # if it lasts


class NodeHarness:
    """Runs nodes in threads, each with a process of one line in place of torchrun."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir = run_dir
        self.codes: dict[int, str] = {}  # by node
        self.started: list[list[str]] = []
        self.ended: dict[str, Error | None] = {}
        self.nodes: dict[str, node.Node] = {}
        self.threads: list[threading.Thread] = []
        (run_dir / "controller.address").write_text("tcp://127.0.0.1:5\n")
        self.status("training")
        monkeypatch.setattr(node, "POLL_S", 0.02)
        monkeypatch.setattr(node, "CAUSE_S", 0.2)
        monkeypatch.setattr(torchrun, "command", self.torchrun)

    def torchrun(
        self, ranks: int, rendezvous: list[str], module: str, *arguments: str
    ) -> list[str]:
        self.started.append(rendezvous)
        conf = next(option for option in rendezvous if option.startswith("--rdzv-conf=rank="))
        index = int(conf.removeprefix("--rdzv-conf=rank=").partition(",")[0])
        return [sys.executable, "-c", self.codes.get(index, SLEEP)]

    def status(self, state: str) -> None:
        whole = self.run_dir / "status.new"
        whole.write_bytes(msgspec.json.encode(RunStatus(state=state)))
        whole.replace(self.run_dir / STATUS_FILE)

    def start(self, *names: str, start_timeout_s: float = 30, **faults: float) -> None:
        settings = config_with(
            trainer={"hosts": 2, "data_parallel_size": 2, "start_timeout_s": start_timeout_s},
            faults={"restart_backoff_s": 0.05, "shutdown_grace_s": 0.3, **faults},
        )
        for name in names:
            Claims(self.run_dir).take(name)
            self.nodes[name] = node.Node(settings, self.run_dir, name)
            self.threads.append(threading.Thread(target=self._run, args=(name, self.nodes[name])))
            self.threads[-1].start()

    def _run(self, name: str, mine: node.Node) -> None:
        try:
            mine.run()
            self.ended[name] = None
        except Error as e:
            self.ended[name] = e

    def incarnation(self, name: str) -> TrainerIncarnation:
        path = self.run_dir / FOLDER / name
        return (
            msgspec.json.decode(path.read_bytes(), type=TrainerIncarnation)
            if path.exists()
            else TrainerIncarnation()
        )

    def pid(self, name: str) -> int:
        torchrun = self.nodes[name]._torchrun
        return torchrun.pid if torchrun else 0

    def wait(self, what: Callable[[], object], limit_s: float = 60.0) -> None:
        deadline = time.monotonic() + limit_s
        while not what():
            assert time.monotonic() < deadline, self.ended
            time.sleep(0.01)

    def both_run(self, number: int) -> None:
        self.wait(
            lambda: all(
                self.incarnation(name).number == number and self.pid(name)
                for name in ("trainer-0", "trainer-1")
            )
        )


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeHarness]:
    made = NodeHarness(tmp_path, monkeypatch)
    yield made
    made.status("stopped")  # ends all nodes
    for thread in made.threads:
        thread.join(60)
        assert not thread.is_alive()


def test_ranks_start_when_all_hosts_take_part(harness: NodeHarness) -> None:
    harness.start("trainer-0")
    harness.wait(lambda: harness.incarnation("trainer-0").number == 1)
    time.sleep(0.3)
    assert harness.started == [] and harness.incarnation("trainer-0").port == 0
    harness.start("trainer-1")
    harness.both_run(1)
    meeting = harness.incarnation("trainer-0")
    for words in harness.started:
        assert {
            "--nnodes=2",
            f"--rdzv-endpoint={meeting.address}:{meeting.port}",
            "--rdzv-id=incarnation-1",
        } < {*words}
    assert sorted(word for words in harness.started for word in words if "rdzv-conf" in word) == [
        "--rdzv-conf=rank=0,timeout=30",
        "--rdzv-conf=rank=1,timeout=30",
    ]


def test_a_death_on_any_host_restarts_all_ranks_once(harness: NodeHarness) -> None:
    harness.start("trainer-0", "trainer-1")
    harness.both_run(1)
    before = [harness.pid(name) for name in harness.nodes]
    for pid in before:  # both nodes see a death
        os.kill(pid, 9)
    harness.both_run(2)
    assert [harness.incarnation(name).restarts for name in harness.nodes] == [1, 1]
    os.kill(harness.pid("trainer-1"), 9)  # one node does
    harness.both_run(3)
    assert [harness.incarnation(name).restarts for name in harness.nodes] == [2, 2]
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)


def test_ranks_that_ignore_sigterm_are_killed_at_a_restart(harness: NodeHarness) -> None:
    ready = harness.run_dir / "ready"
    ignore_sigterm = "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    harness.codes[0] = f"{ignore_sigterm}pathlib.Path({str(ready)!r}).touch(); time.sleep(600)"
    harness.start("trainer-0", "trainer-1")
    harness.both_run(1)
    harness.wait(ready.exists)
    old = harness.pid("trainer-0")
    os.kill(harness.pid("trainer-1"), 9)
    harness.wait(
        lambda: (
            harness.incarnation("trainer-0").number == 2
            and harness.pid("trainer-0") not in (0, old)
        )
    )
    assert not Path(f"/proc/{old}").exists()
    harness.codes[0] = SLEEP


def test_restart_limit_ends_all_hosts_with_the_cause(harness: NodeHarness) -> None:
    harness.codes[1] = "raise SystemExit(1)"
    harness.start("trainer-0", "trainer-1", max_restarts=2)
    harness.wait(lambda: len(harness.ended) == 2)
    for error in harness.ended.values():
        assert (
            "the trainer died 3 times (faults.max_restarts = 2); trainer-1 ended with exit code 1"
            in str(error)
        )
    assert [harness.incarnation(name).number for name in harness.nodes] == [3, 3]


def test_healthy_incarnation_resets_the_restart_count(harness: NodeHarness) -> None:
    harness.start("trainer-0", "trainer-1", max_restarts=1, restart_reset_s=0.3)
    for life in (1, 2, 3):
        harness.both_run(life)
        time.sleep(0.4)
        os.kill(harness.pid("trainer-0"), 9)
    harness.both_run(4)
    assert harness.incarnation("trainer-0").restarts == 1


def test_death_before_the_first_step_ends_the_run_on_all_hosts(harness: NodeHarness) -> None:
    harness.status("starting")
    harness.codes[1] = "raise SystemExit(1)"
    harness.start("trainer-0", "trainer-1")
    harness.wait(lambda: len(harness.ended) == 2)
    log = harness.run_dir / "logs" / "trainer-1.log"
    said = f"trainer-1 ended with exit code 1 before the first training step: its log is {log}"
    assert {str(error) for error in harness.ended.values()} == {said}


def test_host_whose_ranks_lost_their_peers_reports_the_error_of_the_other(
    harness: NodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "CAUSE_S", 60.0)
    harness.status("starting")
    first = harness.run_dir / "first"
    harness.codes[0] = (
        f"import pathlib, time\nwhile not pathlib.Path({str(first)!r}).exists(): time.sleep(0.01)\n"
        "time.sleep(0.2)\nprint('error: the disk is full', flush=True)\nraise SystemExit(2)"
    )
    harness.codes[1] = f"import pathlib\npathlib.Path({str(first)!r}).touch()\nraise SystemExit(1)"
    harness.start("trainer-0", "trainer-1")
    harness.wait(lambda: len(harness.ended) == 2)
    said = "trainer-0 ended with exit code 2 before the first training step: the disk is full"
    assert {str(error) for error in harness.ended.values()} == {said}


def test_error_names_the_host_that_never_joined(harness: NodeHarness) -> None:
    harness.start("trainer-1", start_timeout_s=0.3)
    harness.wait(lambda: harness.ended)
    text = str(harness.ended["trainer-1"])
    assert text.startswith(
        "trainer-1 waited trainer.start_timeout_s = 0.3 s for trainer-0 to join "
        "(trainer incarnation 1)"
    )
    assert "; start it with `join " in text and "trainer-0`, on its host or another" in text
    harness.start("trainer-0", "trainer-1")  # a later start: the failure does not count for it
    harness.both_run(2)
    assert harness.incarnation("trainer-0").restarts == 0


def test_nodes_send_heartbeats_while_their_ranks_train(
    harness: NodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "HEARTBEATS_PER_TIMEOUT", 600)  # 0.1 s
    harness.start("trainer-0", "trainer-1", heartbeat_timeout_s=60)
    harness.both_run(1)
    before = [harness.pid(name) for name in harness.nodes]
    files = [harness.run_dir / FOLDER / name for name in harness.nodes]
    for file in files:
        for _ in range(3):
            beat = file.stat().st_mtime_ns
            harness.wait(lambda file=file, beat=beat: file.stat().st_mtime_ns > beat)
    assert [harness.pid(name) for name in harness.nodes] == before


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Returns the time by which the nodes measure the silence of others; it stands still."""
    now = [0.0]
    fake = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(incarnations, "time", fake)
    return now


def test_silent_host_starts_an_incarnation_that_waits_for_it(
    clock: list[float], harness: NodeHarness
) -> None:
    harness.start("trainer-0", heartbeat_timeout_s=50)
    other = IncarnationFiles(harness.run_dir, "trainer-1", ["trainer-0", "trainer-1"])
    other.write(TrainerIncarnation(1))
    harness.wait(lambda: harness.pid("trainer-0"))
    seen = harness.nodes["trainer-0"]._files._seen["trainer-1"]
    for _ in range(5):  # its host is reachable
        beat = (harness.run_dir / FOLDER / "trainer-1").stat().st_mtime_ns
        other.heartbeat()
        harness.wait(lambda beat=beat: seen.mtime_ns > beat)
        clock[0] += 40
    time.sleep(0.1)
    assert harness.incarnation("trainer-0").number == 1
    clock[0] += 40
    harness.wait(lambda: harness.incarnation("trainer-0").number == 2)
    assert (
        "no heartbeat of trainer-1 for faults.heartbeat_timeout_s = 50 s"
        in harness.incarnation("trainer-0").reason
    )
    harness.wait(lambda: not harness.pid("trainer-0"))
    other.write(TrainerIncarnation(2))  # it returns
    harness.wait(lambda: harness.pid("trainer-0"))


def test_node_that_lost_its_name_stops_silently(harness: NodeHarness) -> None:
    harness.start("trainer-0", "trainer-1")
    harness.both_run(1)
    old = harness.nodes["trainer-1"]
    harness.start("trainer-1")  # elsewhere
    harness.wait(lambda: "trainer-1" in harness.ended)
    assert (
        "trainer-1 was taken over by" in str(harness.ended["trainer-1"]) and old._torchrun is None
    )
    harness.both_run(2)
    time.sleep(0.2)
    assert harness.incarnation("trainer-0").number == 2 and "trainer-0" not in harness.ended


def test_ranks_that_outlive_the_run_are_stopped_after_the_grace_period(
    harness: NodeHarness,
) -> None:
    harness.start("trainer-0", "trainer-1")
    harness.both_run(1)
    harness.status("stopped")
    harness.wait(lambda: len(harness.ended) == 2)
    assert set(harness.ended.values()) == {None}


def test_node_of_an_earlier_start_takes_no_part_in_the_next(
    harness: NodeHarness,
) -> None:
    harness.start("trainer-0", "trainer-1")
    harness.both_run(1)
    (harness.run_dir / "keys").mkdir()
    (harness.run_dir / "keys" / "hub.key").write_text("another")
    harness.wait(lambda: len(harness.ended) == 2)
    assert set(harness.ended.values()) == {None} and harness.incarnation("trainer-0").number == 1
    harness.start("trainer-0", "trainer-1")
    harness.both_run(2)


def test_nodes_end_when_all_ranks_have_finished(clock: list[float], harness: NodeHarness) -> None:
    end = harness.run_dir / "end"
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(end)!r}).exists(): time.sleep(0.01)"
    harness.codes = {0: waits, 1: "pass"}
    harness.start("trainer-0", "trainer-1", heartbeat_timeout_s=50)
    harness.wait(lambda: harness.nodes["trainer-0"]._files.of("trainer-1").done)
    clock[0] += 100  # the finished node is not taken for silent
    time.sleep(0.1)
    end.touch()
    harness.wait(lambda: len(harness.ended) == 2)
    assert set(harness.ended.values()) == {None} and len(harness.started) == 2


def test_unrelated_process_with_the_same_pid_is_not_signalled() -> None:
    faulthandler.register(signal.SIGUSR2)  # this process is asked for its stacks too
    unrelated = subprocess.Popen(["sleep", "60"])  # SIGUSR2 would end this process
    try:
        dump_stacks([SimpleNamespace(hello=SimpleNamespace(pid=unrelated.pid))])  # type: ignore[arg-type]
        with pytest.raises(subprocess.TimeoutExpired):
            unrelated.wait(0.5)
    finally:
        unrelated.kill()
        unrelated.wait()
        faulthandler.unregister(signal.SIGUSR2)


@needs_network_namespaces
@needs_engine
def test_two_hosts_recover_from_loss_of_a_rank_a_host_and_the_job(
    tmp_path: Path,
) -> None:
    model, dataset = make_model(tmp_path / "model"), make_dataset(tmp_path / "train.jsonl", 20)
    program = [
        sys.executable,
        str(SUPPORT / "trainer_hosts_main.py"),
        str(model),
        str(dataset),
        str(tmp_path / "job"),
    ]
    paths = os.pathsep.join([str(ROOT), str(SUPPORT), str(TOOLS / "chaos")])
    (tmp_path / "job").mkdir()
    done = subprocess.run(
        program,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for stage in (
        "training",
        "a rank was killed",
        "the second host was lost",
        "the first host was lost",
        "ended by SIGTERM",
        "finished",
    ):
        assert f"s  {stage}" in done.stderr
