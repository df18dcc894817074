"""While a run on one host is going on, its processes listen on loopback only.

One tiny run of all processes, with its folder in a place that every user can reach: another user
can read no key of the run, and another host reaches no store of it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import store_canary
from needs import needs_engine
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousParameters,
    c10d_rendezvous_backend,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from whole_runs import (
    SHORT_ROLLOUT,
    RunInputs,
    assert_no_process_left,
    processes_of_run,
    start_run,
)

from megatron_async_rl.addresses import free_port

pytestmark = needs_engine
OTHER_USER = 65534


@dataclass
class Listeners:
    """Collects the TCP listeners of all processes of a run until `stop`."""

    run_dir: Path
    launcher: int
    prometheus_port: int
    found: dict[tuple[str, str], str] = field(default_factory=dict)  # (address, port) -> command
    tried: set[tuple[str, int]] = field(default_factory=set)  # as another host, while it listens
    reached: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)  # stores that took a canary

    def __post_init__(self) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.2):
            for process in self._processes():
                try:
                    command = " ".join(process.cmdline())
                    for connection in process.net_connections("tcp"):
                        if connection.status == psutil.CONN_LISTEN:
                            address = (connection.laddr.ip, str(connection.laddr.port))
                            if address not in self.found:
                                self.found[address] = command
                                self._try_as_other_host(connection.laddr.port, command)
                except psutil.Error:
                    continue  # it has ended

    def _try_as_other_host(self, port: int, command: str) -> None:
        for address in store_canary.network_addresses():
            self.tried.add((address, port))
            if store_canary.is_reachable(address, port):
                self.reached.append(f"{address}:{port} of {command}")
                if store_canary.write(address, port, "none", self.run_dir / "canary"):
                    self.written.append(self.reached[-1])

    def _processes(self) -> set[psutil.Process]:
        """Also finds the engine's processes, which rename themselves."""
        found = set(processes_of_run(self.run_dir))
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= set(psutil.Process(self.launcher).children(recursive=True))
        return found

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def free_port_for_long() -> int:
    """Returns a free port that no connection of another process gets from the kernel."""
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    ports = range(max(1024, int(limits[0]) - 10_000), int(limits[0]))
    for port in random.SystemRandom().sample(ports, 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    return free_port()


@pytest.fixture(scope="module")
def watched_run(run_inputs: RunInputs) -> Iterator[Listeners]:
    """A finished run of two trainer ranks, with all listeners that it had."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    run_dir = folder / "run"
    path = run_inputs.config(
        run_dir,
        run={"steps": 2, "export_every": 0},
        evaluation={"sets": {}},
        rollout=SHORT_ROLLOUT,
        monitor={"prometheus_port": (port := free_port_for_long())},
    )
    child = start_run(path)
    listeners = Listeners(run_dir, child.pid, port)
    try:
        output, errors = child.communicate(timeout=300)
        listeners.stop()
        assert child.returncode == 0, output[-3000:] + errors[-3000:]
        assert_no_process_left(run_dir)
        yield listeners
    finally:
        child.kill()
        listeners.stop()
        shutil.rmtree(folder)


def test_processes_of_a_local_run_listen_on_loopback_only(watched_run: Listeners) -> None:
    open_to_others = {
        address: command
        for address, command in watched_run.found.items()
        if not ipaddress.ip_address(address[0]).is_loopback
    }
    assert open_to_others == {}


@pytest.mark.parametrize("part", ["megatron_async_rl.controller", "sglang"])
def test_the_watch_sees_the_listeners_of_a_run(watched_run: Listeners, part: str) -> None:
    assert any(part in command for command in watched_run.found.values())


def test_prometheus_is_served_by_the_controller(watched_run: Listeners) -> None:
    command = watched_run.found["127.0.0.1", str(watched_run.prometheus_port)]
    assert "megatron_async_rl.controller" in command


def test_no_store_of_the_run_takes_a_write_from_the_network(watched_run: Listeners) -> None:
    assert {str(port) for _, port in watched_run.tried} == {port for _, port in watched_run.found}
    assert watched_run.written == []
    assert watched_run.reached == []  # nothing else listens there either


def test_canary_runs_in_the_store_of_torchruns_own_rendezvous(tmp_path: Path) -> None:
    """The design that trainer/torchrun.py replaces: the test above would find it."""
    endpoint, canary = f"127.0.0.1:{free_port_for_long()}", tmp_path / "canary"
    parameters = RendezvousParameters("c10d", endpoint, "job", 1, 1, is_host=True)
    backend, store = c10d_rendezvous_backend.create_backend(parameters)
    handler = DynamicRendezvousHandler.from_backend("job", store, backend, 1, 1)
    port = int(endpoint.rpartition(":")[2])
    address = next(a for a in store_canary.network_addresses() if a != "127.0.0.1")
    assert store_canary.is_reachable(address, port)
    assert store_canary.write(address, port, "job", canary)
    assert not canary.exists()
    with contextlib.suppress(AttributeError, RendezvousError):  # the canary is no rendezvous state
        handler.num_nodes_waiting()
    assert canary.exists()


def run_as_other_user(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        user=OTHER_USER,
        group=OTHER_USER,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_reads_no_key_of_the_run(watched_run: Listeners) -> None:
    run_dir = watched_run.run_dir
    keys = sorted(path for path in (run_dir / "keys").rglob("*") if path.is_file())
    assert len(keys) >= 4
    run_dir.chmod(0o755)  # `run` makes it 0700: here the modes of its content are tested
    run_dir.chmod(0o755)  # the folder of the keys protects itself
    assert "keys" in run_as_other_user("ls", run_dir).stdout.split()
    listed, read = run_as_other_user("ls", run_dir / "keys"), run_as_other_user("cat", *keys)
    assert listed.stdout == read.stdout == ""
    assert read.stderr.count("Permission denied") == len(keys)
