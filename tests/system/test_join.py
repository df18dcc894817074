"""A run whose processes several launchers started, as on several hosts: one host is lost, another takes its place, the first
comes back. The names are the same; who has them is always one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest
from controller_shell import ask, hello_of, with_controller
from hosts import Host, wait_until
from whole_runs import RunInputs

from megatron_async_rl.cli import audit
from megatron_async_rl.config import load
from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.engine_env import engine_python
from megatron_async_rl.errors import ConfigError, Error, ProtocolError
from megatron_async_rl.launcher import join
from megatron_async_rl.launcher.claims import Claims
from megatron_async_rl.observability.status import read_status
from megatron_async_rl.protocol.messages import Heartbeat, Refused, Welcome
from megatron_async_rl.protocol.transport import Link


def test_name_belongs_to_its_last_claimant(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.other("rollout-0") == ""
    first.take("rollout-0")
    first.take("rollout-1")
    assert first.other("rollout-0") == "" and second.other("rollout-0") != ""
    second.take("rollout-0")
    assert f"process {os.getpid()}" in first.other("rollout-0") and second.other("rollout-0") == ""
    assert (first.elsewhere("rollout"), second.elsewhere("rollout"), first.elsewhere("reward")) == (
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
            assert not controller.core.fleet.rollout[
                "rollout-0"
            ].is_serving  # what the old one served counts for nothing
            await old.send(Heartbeat())
            with pytest.raises(ProtocolError, match="its name was taken over"):
                await old.receive()  # so it ends
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
        Error, match=r"is not on: no controller within trainer\.start_timeout_s = 0"
    ):
        join(tmp_path / "run", ["rollout-0"])


@pytest.mark.skipif(
    engine_python() is None, reason="no engine environment: bash tools/setup_env.sh"
)
def test_lost_host_is_replaced_and_refused_when_it_returns(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    path = RunInputs(*model_and_dataset, model_and_dataset[1]).config(
        run_dir,
        run={"steps": 5000, "export_every": 0},
        data={"eval": None},
        rollout={"lease_timeout_s": 30, "max_new_tokens": 12, "max_concurrent_samples": 16},
        faults={"heartbeat_timeout_s": 5, "restart_backoff_s": 0.1},
        weights={"update_timeout_s": 10.0},  # the host may vanish in the middle of one
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
        first.freeze()  # the host cannot be reached
        frozen_at = read_status(run_dir).version
        second = joined("second")
        wait_until(
            lambda: trained(frozen_at + 8)
        )  # more than the buffer held: the second's samples
        first.thaw()  # and is back
        wait_until(lambda: first.process.poll() is not None, 60)
        assert first.process.returncode == 0 and first.says("nothing more to do here")
        assert "is not started again here" in first.log.read_text()
        assert (
            "its name was taken over: rollout-0 is process"
            in (run_dir / "logs" / "rollout-0.log").read_text()
        )
        assert first.watch.left() == []
        back_at = read_status(run_dir).version
        wait_until(lambda: trained(back_at + 2))

        second.kill()  # this one is lost for good, with all it had
        assert second.watch.left() == []
        killed_at = read_status(run_dir).version
        third = joined("third")
        wait_until(lambda: trained(killed_at + 8))

        third.process.send_signal(signal.SIGTERM)  # and this one is taken away in order
        assert third.process.wait(60) == 75
        log = run_dir / "logs" / "controller.log"
        wait_until(
            lambda: "rollout-0: told to end (SIGTERM)" in log.read_text(), 10
        )  # not by its silence

        main.process.send_signal(signal.SIGTERM)
        assert main.process.wait(90) == 75
        assert main.watch.left() == [] and third.watch.left() == []
        result = audit.audit(run_dir, load.load(run_dir / "config.yaml").staleness.max_staleness)
        assert result.breaches == [] and result.lost == result.duplicated == 0 and result.lives == 1
    finally:
        for host in hosts:
            host.kill()
