"""A worker that sends a forbidden message loses its connection; the run continues unchanged."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import numpy as np
import pytest
from controller_shell import ask, hello_of, with_controller
from core_builders import make_sample

from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.protocol import messages as m
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.protocol.rules import RULES
from megatron_async_rl.protocol.types import Partial, SampleKey

KEY = SampleKey(1, 0, 1, 0)
LONG = np.zeros(5000, np.int32)  # run-length encoded: a few bytes
WRONG = [
    ("reward", m.StepDone(1, {}), "StepDone, which only a first trainer rank may send"),
    ("reward", m.Generated(KEY, make_sample(0)), "Generated, which only a rollout worker may send"),
    ("rollout", m.ScoreResult(KEY, 1.0), "ScoreResult, which only a reward worker may send"),
    ("rollout", m.GetBatch(0), "GetBatch, which only a leader may send"),
    ("trainer", m.GetBatch(-1), "GetBatch with version = -1"),
    ("trainer", m.CheckpointSaved(0, "a\0b"), r"CheckpointSaved with folder = 'a\x00b'"),
    ("trainer", m.StepDone(1, {"no area": 1.0}), "StepDone with stats = {'no area': 1.0}"),
    ("trainer", m.Shutdown("over"), "Shutdown, which no worker may send"),
    (
        "rollout",
        m.PartialSample(KEY, Partial(LONG, LONG.astype(np.float32), LONG)),
        "an array of 5000 elements, at most 96 can be",
    ),
]


def name_of(role: str) -> str:
    return f"{role}-0"


@pytest.mark.parametrize(("role", "message", "reason"), WRONG)
def test_wrong_message_costs_the_connection_and_changes_nothing(
    model_and_dataset: tuple[Path, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    role: m.Role,
    message: m.Message,
    reason: str,
) -> None:
    ranks = {"leader": 0, "stage": 0} if role == "trainer" else {}
    hello = hello_of(model_and_dataset, role, name_of(role), **ranks)

    async def test(controller: Controller, link: Link) -> None:
        await ask(link, hello)
        before = (
            controller.core.version,
            controller.core.state.ledger.table(controller.core.state.pending),
        )
        for _ in range(3):
            refused = await ask(link, message)
            assert isinstance(refused, m.Refused)
            assert refused.reason.startswith(f"{name_of(role)} sent ") and reason in refused.reason
        assert isinstance(await ask(link, hello), m.Refused)  # the process must end
        lines = [line for line in caplog.messages if line.startswith("refused: ")]
        assert len(lines) == 1 and name_of(role) in lines[0]
        assert controller.handlers.num_refused[name_of(role)] == 1
        assert before == (
            controller.core.version,
            controller.core.state.ledger.table(controller.core.state.pending),
        )
        again = Link(tmp_path)
        assert isinstance(await ask(again, hello), m.Welcome)  # its next incarnation is welcome
        again.close()

    with caplog.at_level(logging.ERROR):
        with_controller(model_and_dataset, tmp_path, test)


@pytest.mark.parametrize(
    ("role", "name"),
    [("reward", "rollout-1"), ("rollout", "rollout-1\nrefused: x"), ("rollout", "../rollout-1")],
)
def test_name_that_does_not_fit_the_role_is_refused(
    model_and_dataset: tuple[Path, Path], tmp_path: Path, role: m.Role, name: str
) -> None:
    async def test(controller: Controller, link: Link) -> None:
        refused = await ask(link, hello_of(model_and_dataset, role, name))
        assert isinstance(refused, m.Refused) and refused.reason.isprintable()
        assert f"must be {role}-N" in refused.reason and len(controller.workers) == 0
        hello = hello_of(model_and_dataset, "reward", "reward-0")
        assert isinstance(await ask(link, hello), m.Welcome)

    with_controller(model_and_dataset, tmp_path, test)


def test_each_leader_is_one_worker(model_and_dataset: tuple[Path, Path], tmp_path: Path) -> None:
    async def test(controller: Controller, link: Link) -> None:
        second = Link(tmp_path)
        hello = hello_of(model_and_dataset, "trainer", "trainer-0", leader=0, stage=0)
        assert isinstance(await ask(link, hello), m.Welcome)
        refused = await ask(second, hello_of(model_and_dataset, "trainer", "trainer-1", leader=0))
        assert refused == m.Refused("trainer-1 joined as leader 0, which is trainer-0")
        assert isinstance(await ask(second, hello), m.Welcome)  # a restarted one replaces it
        second.close()

    with_controller(model_and_dataset, tmp_path, test)


def test_work_of_a_refused_worker_is_leased_again(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    async def test(controller: Controller, link: Link) -> None:
        await ask(link, hello_of(model_and_dataset, "rollout", "rollout-0", serving=0))
        await controller.queue.submit(inputs.AdmissionOpened())
        lease = await link._receive()
        assert isinstance(lease, m.Generate)
        await link.send(m.GetBatch(0))
        while not isinstance(await link._receive(), m.Refused):
            pass
        while "rollout-0" in controller.core.fleet.rollout:  # noqa: ASYNC110  within TIMEOUT_S
            await asyncio.sleep(0.01)
        again = Link(tmp_path)
        await again.send(hello_of(model_and_dataset, "rollout", "rollout-1", serving=0))
        while not isinstance(leased := await again._receive(), m.Generate):
            pass
        assert leased.group_id == lease.group_id and leased.attempt == lease.attempt + 1
        again.close()

    with_controller(model_and_dataset, tmp_path, test)


def test_trainer_that_asks_for_a_batch_that_is_not_recorded_is_refused(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    async def test(controller: Controller, link: Link) -> None:
        controller.core.state.version = 3  # the journal has no batch
        await ask(link, hello_of(model_and_dataset, "trainer", "trainer-0", leader=0, stage=0))
        refused = await ask(link, m.GetBatch(0))
        assert isinstance(refused, m.Refused) and "has no batch of version 0" in refused.reason

    with_controller(model_and_dataset, tmp_path, test)


def test_rules_cover_exactly_the_messages_that_are_handled(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    async def test(controller: Controller, link: Link) -> None:
        assert controller.handlers._handlers.keys() == RULES.keys()

    with_controller(model_and_dataset, tmp_path, test)
