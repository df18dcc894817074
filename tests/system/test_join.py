"""A run with processes of several launchers, as on several hosts.

One host is lost, another takes over its names, the first returns: a name has one owner at any time.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest
from controller_shell import ask, hello_of, with_controller
from hosts import Host, wait_until
from needs import needs_engine
from whole_runs import SHORT_ROLLOUT, RunInputs

from megatron_async_rl.cli import audit
from megatron_async_rl.config import load
from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.errors import ConfigError, Error, ProtocolError
from megatron_async_rl.launcher.claims import Claims
from megatron_async_rl.launcher.join import join
from megatron_async_rl.observability.status import read_status
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.protocol.messages import Heartbeat, Refused, Welcome


def test_name_belongs_to_its_last_claimant(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.other_owner("rollout-0") == ""
    first.take("rollout-0")
    first.take("rollout-1")
    assert first.other_owner("rollout-0") == "" and second.other_owner("rollout-0") != ""
    second.take("rollout-0")
    assert (
        f"process {os.getpid()}" in first.other_owner("rollout-0")
        and second.other_owner("rollout-0") == ""
    )
    assert (
        first.count_elsewhere("rollout"),
        second.count_elsewhere("rollout"),
        first.count_elsewhere("reward"),
    ) == (
        1,
        1,
        0,
    )


def test_process_that_lost_its_name_is_refused(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    async def test(controller: Controller, old: Link) -> None:
        first = hello_of(model_and_dataset, "rollout", "rollout-0", serving=0)
        assert isinstance(await ask(old, first), Welcome)
        new = Link(tmp_path)
        try:
            second = msgspec.structs.replace(
                hello_of(model_and_dataset, "rollout", "rollout-0"), pid=2
            )
            assert isinstance(await ask(new, second), Welcome)
            for message in (Heartbeat(), first):
                refused = await ask(old, message)
                assert (
                    isinstance(refused, Refused) and "rollout-0 is process 2 now" in refused.reason
                )
            assert controller.workers["rollout-0"].hello.pid == 2
            # the version that the old process served does not count
            assert not controller.core.fleet.rollout["rollout-0"].is_serving
            await old.send(Heartbeat())
            with pytest.raises(ProtocolError, match="its name was taken over"):
                await old.receive()  # and the process ends
        finally:
            new.close()

    with_controller(model_and_dataset, tmp_path, test)


def test_joining_without_names_is_one_clear_error(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        join(tmp_path, ["rollout-0"])
    RunInputs(*model_and_dataset, model_and_dataset[1]).config(tmp_path / "run").rename(
        tmp_path / "config.yaml"
    )
    with pytest.raises(ConfigError, match=r"'controller' cannot be started apart"):
        join(tmp_path, ["controller"])


def test_joining_a_stopped_run_is_one_clear_error(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    path = RunInputs(*model_and_dataset, model_and_dataset[1]).config(
        tmp_path / "run", trainer={"start_timeout_s": 0.5}
    )
    (tmp_path / "run").mkdir()
    path.rename(tmp_path / "run" / "config.yaml")
    with pytest.raises(
        Error, match=r"no running controller in .* within trainer\.start_timeout_s = 0"
    ):
        join(tmp_path / "run", ["rollout-0"])


@needs_engine
def test_lost_host_is_replaced_and_refused_when_it_returns(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    path = RunInputs(*model_and_dataset, model_and_dataset[1]).config(
        run_dir,
        run={"steps": 5000, "export_every": 0},
        evaluation={"sets": {}},
        rollout=SHORT_ROLLOUT | {"lease_timeout_s": 30},
        faults={"heartbeat_timeout_s": 8, "restart_backoff_s": 0.1},
        weights={"update_timeout_s": 10.0},  # the host may be lost during an update
        megatron={"tensor_model_parallel_size": 1},
        checkpoint={"every": 2},
    )
    hosts = [Host(tmp_path / "run.out", "run", str(path), "--elsewhere", "rollout-0")]
    main = hosts[0]

    def trained(version: int) -> bool:
        assert main.process.poll() is None, main.log.read_text()[-3000:]
        status = run_dir / "status.json"
        return status.exists() and read_status(run_dir).version >= version

    def joined(name: str) -> Host:
        hosts.append(Host(tmp_path / f"{name}.out", "join", str(run_dir), "rollout-0"))
        return hosts[-1]

    try:
        wait_until(lambda: (run_dir / "controller.address").exists())
        first = joined("first")
        wait_until(lambda: trained(2))
        first.freeze()  # as if the host were unreachable
        frozen_at = read_status(run_dir).version
        second = joined("second")
        # more batches than were buffered: samples of the second host are among them
        wait_until(lambda: trained(frozen_at + 8))
        first.thaw()
        wait_until(lambda: first.process.poll() is not None, 60)
        assert first.process.returncode == 0 and first.says("this host's part of the run is done")
        assert "is not restarted here" in first.log.read_text()
        assert (
            "its name was taken over: rollout-0 is process"
            in (run_dir / "logs" / "rollout-0.log").read_text()
        )
        assert first.watch.left() == []
        back_at = read_status(run_dir).version
        wait_until(lambda: trained(back_at + 2))

        second.kill()  # all its processes are lost
        assert second.watch.left() == []
        killed_at = read_status(run_dir).version
        third = joined("third")
        wait_until(lambda: trained(killed_at + 8))

        third.process.send_signal(signal.SIGTERM)  # stops in order
        assert third.process.wait(60) == 75
        log = run_dir / "logs" / "controller.log"
        # sooner than by a missing heartbeat
        wait_until(lambda: "rollout-0: ended by SIGTERM" in log.read_text(), 10)

        main.process.send_signal(signal.SIGTERM)
        assert main.process.wait(90) == 75
        assert main.watch.left() == [] and third.watch.left() == []
        result = audit.audit(run_dir, load.load(run_dir / "config.yaml").staleness.max_staleness)
        assert result.breaches == [] and result.lost == result.duplicated == 0
        assert result.epochs == 1
    finally:
        for host in hosts:
            host.kill()
