"""Restarts of dead processes and their limits, over real child processes of one line each."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from megatron_async_rl import processes
from megatron_async_rl.config.sections import FaultsConfig
from megatron_async_rl.launcher.claims import Claims
from megatron_async_rl.launcher.supervisor import Supervisor
from megatron_async_rl.observability.status import STATUS_FILE, RunStatus

SLEEP = "import time; time.sleep(600)"


def child(code: str) -> Callable[[], subprocess.Popen[bytes]]:
    return lambda: processes.start([sys.executable, "-c", code], Path("/dev/null"))


class Bench:
    """A supervisor over processes of one line each."""

    def __init__(self, run_dir: Path, **rules: float) -> None:
        self.run_dir = run_dir
        self.told: list[str] = []
        self.supervisor = Supervisor(
            run_dir, FaultsConfig(restart_backoff_s=0.05, **rules), self.told.append
        )
        self.status("training")

    def status(self, state: str, lost: list[str] | None = None, **fields: int) -> None:
        (self.run_dir / STATUS_FILE).write_bytes(
            msgspec.json.encode(RunStatus(state=state, lost=lost or [], **fields))
        )

    def start(self, **codes: str) -> None:
        for name, code in {"controller": SLEEP, "trainer": SLEEP, **codes}.items():
            self.supervisor.start(name.replace("_", "-"), child(code))

    def watch(self, seconds: float = 60.0, until: Callable[[], bool] = lambda: False) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.supervisor.poll():
                return True
            if until():
                return False
            time.sleep(0.02)
        return False

    def pid(self, name: str) -> int:
        return self.supervisor.children[name].process.pid


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(**rules: float) -> Bench:
        made.append(Bench(tmp_path, **rules))
        return made[-1]

    yield build
    for bench in made:
        processes.stop(bench.supervisor.processes, 0.0)


def test_dead_worker_is_restarted_and_others_are_untouched(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    bench.start(rollout_0=SLEEP, reward_0=SLEEP)
    before = {name: bench.pid(name) for name in bench.supervisor.children}
    bench.watch(0.1)
    bench.supervisor.children["rollout-0"].process.kill()
    assert not bench.watch(until=lambda: bench.supervisor.num_restarts == 1)
    after = {name: bench.pid(name) for name in bench.supervisor.children}
    assert {name for name in before if before[name] != after[name]} == {"rollout-0"}


def test_process_that_cannot_be_started_now_is_tried_again(make: Callable[..., Bench]) -> None:
    bench = make(max_restarts=2)
    bench.start(rollout_0=SLEEP)
    assert not bench.watch(until=lambda: bench.supervisor._has_trained)
    child = bench.supervisor.children["rollout-0"]
    start, failures = child.start, [OSError(11, "Resource temporarily unavailable")]

    def try_start() -> subprocess.Popen[bytes]:
        if failures:
            raise failures.pop()
        return start()

    child.start = try_start
    pid = bench.pid("rollout-0")
    child.process.kill()
    assert not bench.watch(until=lambda: bench.pid("rollout-0") != pid)
    assert child.process.poll() is None and child.restarts == 2
    assert any("rollout-0 cannot be started: [Errno 11]" in line for line in bench.told)
    failures += [OSError(11, "again")] * 9
    child.process.kill()
    assert bench.watch() and bench.supervisor.failed == "rollout-0"


def test_exit_before_the_first_step_ends_the_run(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.status("starting")
    bench.start(rollout_0="raise SystemExit(2)")
    assert bench.watch() and bench.supervisor.failed == "rollout-0"
    assert bench.supervisor.num_restarts == 0


def test_crashing_server_is_abandoned_if_enough_remain(
    make: Callable[..., Bench],
) -> None:
    bench = make(max_restarts=2)
    bench.start(rollout_0=SLEEP, rollout_1="raise SystemExit(1)")
    assert not bench.watch(until=lambda: bench.supervisor.children["rollout-1"].given_up)
    assert bench.supervisor.num_restarts == 2
    assert "rollout-1 died 3 times (faults.max_restarts = 2) and is given up" in bench.told[-1]


def test_run_ends_with_reason_below_min_servers(make: Callable[..., Bench]) -> None:
    bench = make(max_restarts=1, min_servers=2)
    bench.start(rollout_0=SLEEP, rollout_1="raise SystemExit(1)")
    assert bench.watch() and bench.supervisor.failed == "rollout-1"
    assert (
        "faults.max_restarts = 1" in bench.supervisor.reason
        and "faults.min_servers = 2" in bench.supervisor.reason
    )


def test_controller_error_ends_the_run_and_a_kill_does_not(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    bench.start()
    bench.watch(0.1)
    bench.supervisor.children["controller"].process.kill()
    assert not bench.watch(until=lambda: bench.supervisor.num_restarts == 1)
    bench.supervisor.children["controller"].start = child(
        f"raise SystemExit({processes.EXIT_ERROR})"
    )
    bench.supervisor.children["controller"].process.kill()
    assert bench.watch() and bench.supervisor.failed == "controller"


def test_trainer_that_a_killed_controller_told_to_end_is_restarted(
    make: Callable[..., Bench],
) -> None:
    """At the end of the run it has nothing left to do."""
    bench = make()
    bench.start(trainer="")
    [trainer] = bench.supervisor.trainers
    controller = bench.supervisor.children["controller"]
    for version in (2, 3):
        bench.status("training", version=version, steps=3)
        assert not bench.watch(until=lambda: trainer.process.poll() == 0)
        pid = controller.process.pid
        controller.process.kill()
        assert not bench.watch(until=lambda pid=pid: controller.process.pid != pid)
        bench.watch(0.2)
        assert trainer.restarts == 1


def test_silent_worker_is_killed_after_its_start_time(make: Callable[..., Bench]) -> None:
    bench = make(heartbeat_timeout_s=0.3)
    bench.start(rollout_0=SLEEP)
    bench.status("training", ["rollout-0"])

    def fresh() -> bool:  # the controller's status changes
        bench.status("training", ["rollout-0"])
        return bench.supervisor.num_restarts >= 1

    assert not bench.watch(until=fresh)
    assert "rollout-0 sends no heartbeat; it is killed" in bench.told

    def still_starting() -> bool:
        bench.status("training", ["rollout-0"])
        return False

    bench.watch(1.0, until=still_starting)
    assert bench.supervisor.num_restarts == 1


def test_controller_without_status_updates_is_killed(make: Callable[..., Bench]) -> None:
    bench = make(heartbeat_timeout_s=0.3)
    bench.start()
    before = bench.pid("controller")
    assert not bench.watch(until=lambda: bench.pid("controller") != before)


def test_run_ends_when_controller_and_trainer_exit_cleanly(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    bench.start(controller="pass", trainer="pass", rollout_0="raise SystemExit(1)")
    assert bench.watch()
    assert not bench.supervisor.failed


def test_process_claimed_by_another_launcher_is_left_alone(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    bench.start(rollout_0=SLEEP)
    bench.watch(0.1)
    Claims(bench.run_dir).take("rollout-0")
    bench.supervisor.children["rollout-0"].process.kill()
    assert not bench.watch(until=lambda: bench.supervisor.children["rollout-0"].given_up)
    assert bench.supervisor.num_restarts == 0 and "is not restarted here" in bench.told[-1]
    assert not bench.watch(0.3)  # the run continues


def test_servers_of_other_launchers_count_for_min_servers(make: Callable[..., Bench]) -> None:
    bench = make(max_restarts=0, min_servers=1)
    Claims(bench.run_dir).take("rollout-1")
    bench.start(rollout_0="raise SystemExit(1)")
    assert not bench.watch(until=lambda: bench.supervisor.children["rollout-0"].given_up)
    assert "is given up; 1 rollout workers remain" in bench.told[-1]


def test_launcher_without_the_controller_ends_with_the_run(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.supervisor.start("rollout-0", child(SLEEP))
    assert not bench.watch(0.3)
    bench.status("finished")
    assert bench.watch() and not bench.supervisor.failed


def test_run_that_fails_before_training_is_blamed_on_the_controller(tmp_path: Path) -> None:
    """The workers end first, because the controller told them, and are no cause."""
    bench = Bench(tmp_path)
    bench.status("failed")
    bench.supervisor._has_trained = False
    bench.start(
        controller="import time; time.sleep(0.7); raise SystemExit(2)", reward_0="", rollout_0=""
    )
    assert bench.watch()
    assert bench.supervisor.failed == "controller"
