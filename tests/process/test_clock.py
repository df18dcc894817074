"""No decision depends on the wall clock, which may jump by an hour in either direction.

Checked in the source, where only timestamps may read it, and on a running controller.
"""

from __future__ import annotations

import ast
import asyncio
import itertools
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from controller_shell import ask, hello_of, with_controller
from simulation import simulate
from source_files import PACKAGE, relative_path, source_files

from megatron_async_rl.controller import controller as controller_module
from megatron_async_rl.controller import handlers as handlers_module
from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import Action, ServerLost
from megatron_async_rl.observability.status import read_status
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.protocol.messages import Heartbeat

HOUR_S = 3600.0
CLOCKS = {
    "time",
    "time_ns",
    "localtime",
    "gmtime",
    "ctime",
    "strftime",
    "clock_gettime",
    "now",
    "utcnow",
    "today",
}
# names of values for readers: in status.json, TensorBoard and the live display
TIMESTAMPS = {"updated_unix", "now_unix", "wall_time", "silent_s"}


def wall_clock_reads(tree: ast.AST) -> list[ast.Call]:
    """Returns the calls of a clock that can be set, however it was imported."""
    bare = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime")
        for alias in node.names
        if alias.name in CLOCKS
    }
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        owner, _, name = ast.unparse(call.func).rpartition(".")
        of_a_clock = (
            owner.split(".")[-1] in ("time", "datetime", "date", "_time") and name in CLOCKS
        )
        if of_a_clock or (not owner and name in bare):
            found.append(call)
    return found


def decisions_by_wall_clock(tree: ast.AST) -> list[str]:
    """Returns the reads of a wall clock that are no timestamps."""
    timestamps = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in TIMESTAMPS:
            timestamps |= {id(inner) for inner in ast.walk(node.value)}
        if isinstance(node, ast.Assign) and all(
            ast.unparse(target) in TIMESTAMPS for target in node.targets
        ):
            timestamps |= {id(inner) for inner in ast.walk(node.value)}
    return [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in wall_clock_reads(tree)
        if id(call) not in timestamps
    ]


@pytest.mark.parametrize("path", source_files(PACKAGE), ids=relative_path)
def test_wall_clock_is_read_only_for_timestamps(path: Path) -> None:
    assert decisions_by_wall_clock(ast.parse(path.read_text())) == []


def test_timestamps_are_made_only_in_observability() -> None:
    readers = {
        relative_path(path)
        for path in source_files(PACKAGE)
        if wall_clock_reads(ast.parse(path.read_text()))
    }
    assert readers and all(path.startswith(f"{PACKAGE}/observability/") for path in readers)


def test_controller_core_imports_no_clock() -> None:
    core = source_files(f"{PACKAGE}/controller/core")
    assert core
    for path in core:
        imports = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
        }
        assert not imports & {"time", "datetime", "asyncio", "random"}, path


@pytest.mark.parametrize(
    "source",
    [
        "import time\ndeadline = time.time() + 5",
        "import time\nif time.time_ns() > x: pass",
        "from time import time\nbegan = time()",
        "from time import time as now\nbegan = now()",
        "import datetime\nbegan = datetime.datetime.now()",
        "from datetime import datetime\nbegan = datetime.utcnow()",
    ],
)
def test_checker_finds_a_decision_by_wall_clock(source: str) -> None:
    assert decisions_by_wall_clock(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["began = time.monotonic()", "write(updated_unix=time.time())", "loop.time()"]
)
def test_checker_allows_monotonic_clocks_and_timestamps(source: str) -> None:
    assert decisions_by_wall_clock(ast.parse(source)) == []


def jumping_clock(seed: int = 0) -> float:
    return time.monotonic() + 1.8e9 + random.choice([-HOUR_S, 0.0, HOUR_S])


def test_simulation_is_unchanged_by_wall_clock_jumps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = [simulate(seed) for seed in range(100)]
    monkeypatch.setattr(time, "time", jumping_clock)
    assert [simulate(seed) for seed in range(100)] == before


async def send_heartbeats(controller: Controller, link: Link) -> None:
    """Sends them until the controller's clock has ticked three times."""
    ticks, handle = 0, controller.core.handle

    def counting_handle(event: inputs.CoreEvent, now: float) -> list[Action]:
        nonlocal ticks
        ticks += isinstance(event, inputs.Tick)
        return handle(event, now)

    controller.core.handle = counting_handle  # type: ignore[method-assign]
    while ticks < 3:
        await link.send(Heartbeat())
        await asyncio.sleep(0.2)


def test_controller_loses_no_worker_when_the_wall_clock_jumps(
    model_and_dataset: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(controller: Controller, link: Link) -> None:
        await ask(link, hello_of(model_and_dataset, "rollout", "rollout-0", serving=0))
        await send_heartbeats(controller, link)
        assert list(controller.core.fleet.rollout) == ["rollout-0"]
        status = read_status(tmp_path)
        assert 0 < status.elapsed_s < 60 and status.fleet[0].state == "serving"

    reads = itertools.count()

    def counted_clock() -> float:
        next(reads)
        return jumping_clock()

    monkeypatch.setattr(time, "time", counted_clock)
    with_controller(model_and_dataset, tmp_path, test)
    assert next(reads) > 3  # it was read, for timestamps


def test_controller_on_the_wall_clock_would_lose_workers(
    model_and_dataset: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counter-test of the one above: with the wall clock in place of the monotonic one."""
    losses = []

    async def test(controller: Controller, link: Link) -> None:
        await ask(link, hello_of(model_and_dataset, "rollout", "rollout-0", serving=0))
        handle = controller.core.handle

        def recording_handle(event: object, now: float) -> list[Action]:
            actions = handle(event, now)
            losses.extend(action.worker for action in actions if isinstance(action, ServerLost))
            return actions

        controller.core.handle = recording_handle  # type: ignore[method-assign]
        await send_heartbeats(controller, link)  # each tick an hour after the last beat

    hours = itertools.count()
    wrong = SimpleNamespace(
        monotonic=lambda: time.monotonic() + next(hours) * HOUR_S, time=time.time, sleep=time.sleep
    )
    monkeypatch.setattr(controller_module, "time", wrong)
    monkeypatch.setattr(handlers_module, "time", wrong)
    with_controller(model_and_dataset, tmp_path, test)
    assert "rollout-0" in losses
