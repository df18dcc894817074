"""What a workflow may return: a fault of it fails the sample, with a message that names it."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from chat_model import make_chat_tokenizer
from config_builders import config_tree
from core_builders import make_sample

from megatron_async_rl.config import load
from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.error_log import user_error
from megatron_async_rl.protocol.messages import Generate, GenerateFailed, Message
from megatron_async_rl.protocol.types import NOT_GENERATED, Prompt, Sample, SampleKey
from megatron_async_rl.protocol.wire import Codec
from megatron_async_rl.reward import scoring_process
from megatron_async_rl.rollout.samples.returned import ReturnedSamples
from megatron_async_rl.rollout.worker import RolloutWorker

KEY = SampleKey(1, 2, 1, 0)
PROMPT = Prompt("p", np.arange(3, dtype=np.int32), {"messages": []})
WORKFLOW = "my.module:Flow"


@pytest.fixture
def returned() -> ReturnedSamples:
    config = load.from_tree(config_tree(**{"rollout.workflow": WORKFLOW}))
    return ReturnedSamples(config, logging.getLogger(__name__))


def as_it_is(sample: Sample) -> Sample:
    return sample


def sample(**changes: Any) -> Sample:
    return msgspec.structs.replace(make_sample(0), **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"reward": 10**400}, "reward = 1000"),
        ({"reward": 10**5000}, "reward = a number of too many digits"),
        ({"reward": 1e10}, "reward = 10000000000"),
        ({"reward": float("nan")}, "reward = nan"),
        ({"reward": "1"}, "reward = '1'"),
        ({"turn_rewards": [1.0, 10**30]}, "reward = 1000"),
        ({"discount": 1.5}, r"discount = 1\.5"),
        ({"text": "half a pair: \ud83d"}, "no message can carry"),
        ({"text": b"bytes"}, r"\$\.sample\.text"),
        ({"stop": "eos"}, r"\$\.sample\.stop"),
        ({"num_interrupts": 10**30}, "no message can carry"),
        ({"num_interrupts": -1}, "num_interrupts = -1"),
        ({"ids": np.arange(4, dtype=np.int64)}, "int64"),
        ({"logprobs": [0.0]}, r"\$\.sample\.logprobs"),
        ({"turn_starts": [np.int64(3)]}, "int64"),
        ({"versions": np.full(4, NOT_GENERATED, np.int32)}, "without a generated token"),
        ({"logprobs": np.zeros(1000, np.float32)}, "1000 elements, at most 128"),
    ],
)
def test_value_that_no_message_can_carry_fails_the_sample_by_name(
    returned: ReturnedSamples, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DataError, match=f"rollout.workflow = {WORKFLOW} returned .*{named}"):
        returned.encoded(KEY, sample(**changes), as_it_is)


def test_something_else_than_a_sample_is_named(returned: ReturnedSamples) -> None:
    with pytest.raises(DataError, match="returned a dict, must be a Sample; correct"):
        returned.encoded(KEY, {"text": "1"}, as_it_is)


def test_numbers_of_numpy_are_sent_as_plain_ones(returned: ReturnedSamples) -> None:
    given = sample(
        reward=np.float32(0.5),
        discount=np.float64(1.0),
        turn_rewards=[True],
        metrics={"mine": np.float64(2.0), "large": 10**400, "larger": 10**5000},
    )
    sent = Codec().decode(returned.encoded(KEY, given, as_it_is)).sample
    assert (sent.reward, sent.discount, sent.turn_rewards) == (0.5, 1.0, [1.0])
    assert sent.metrics == {"mine": 2.0}


def test_error_texts_can_be_sent_whatever_the_user_has_put_in() -> None:
    error = ValueError("half a pair: \ud83d")
    assert user_error(error) == "ValueError: half a pair: \\ud83d"


class RecordedLink:
    def __init__(self) -> None:
        self.sent: list[Message] = []

    async def send(self, message: Message) -> None:
        self.sent.append(message)


async def cancels_itself() -> None:
    waited = asyncio.create_task(asyncio.sleep(9))
    waited.cancel()
    await waited


async def ends_the_program() -> None:
    sys.exit("no tool")


async def ends_the_program_when_cancelled() -> None:
    try:
        await asyncio.sleep(9)
    finally:
        sys.exit("no tool")


class Flow:
    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act

    async def run(self, prompt: Prompt, policy: Any, sampling: Any) -> None:
        prompt.row["messages"].append("of this sample")
        await self._act()


def run_sample(
    folder: Path, act: Callable[[], Any], cancel: bool, prompt: Prompt = PROMPT
) -> list[Message]:
    """Returns what a rollout worker sends of a sample whose workflow does `act`."""
    make_chat_tokenizer(model := folder / "model")
    (model / "config.json").write_text('{"vocab_size": 100}')
    config = load.from_tree(config_tree(**{"model.path": str(model)}))

    async def run() -> list[Message]:
        link, client = RecordedLink(), SimpleNamespace(version=(0, 5, 21))
        server = SimpleNamespace(client=client, started_from=None)
        worker = RolloutWorker("rollout-0", config, link, server, Flow(act))  # type: ignore[arg-type]
        lease = Generate(1, 2, 1, [0], "train", prompt, 8, 1.0)
        task = asyncio.create_task(worker._run_sample(lease, 0, None))
        for _ in range(20):  # `act` has begun
            await asyncio.sleep(0)
        if cancel:
            task.cancel()
        await task
        return link.sent

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("act", "error"),
    [(cancels_itself, "CancelledError"), (ends_the_program, "SystemExit: no tool")],
)
def test_workflow_that_ends_otherwise_than_by_an_error_fails_its_sample(
    tmp_path: Path, act: Callable[[], Any], error: str
) -> None:
    [failed] = run_sample(tmp_path, act, cancel=False)
    assert isinstance(failed, GenerateFailed) and failed.error.startswith(error)


def test_workflow_changes_the_row_of_its_own_sample_only(tmp_path: Path) -> None:
    run_sample(tmp_path, cancels_itself, cancel=False)
    assert PROMPT.row == {"messages": []}


def test_row_that_is_nested_too_deeply_fails_its_sample(tmp_path: Path) -> None:
    row: dict[str, Any] = {}
    for _ in range(2000):
        row = {"messages": row}
    prompt = msgspec.structs.replace(PROMPT, row=row)
    [failed] = run_sample(tmp_path, cancels_itself, cancel=False, prompt=prompt)
    assert isinstance(failed, GenerateFailed) and failed.error.startswith("RecursionError")


def test_workflow_that_ends_the_program_when_its_lease_has_ended_is_ignored(tmp_path: Path) -> None:
    assert run_sample(tmp_path, ends_the_program_when_cancelled, cancel=True) == []


class Numbers(list[float]):
    def __iter__(self) -> Any:
        raise RuntimeError("of the list itself")


@pytest.mark.parametrize("value", [Numbers([1.0]), (1.0, {("a", 1): 2.0}), 10**400, "1", None])
def test_odd_value_of_a_reward_function_is_a_failed_attempt(
    monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    monkeypatch.setattr(scoring_process, "_function", lambda prompt, response, row: value)
    outcome = scoring_process.score_custom("", "", {}, [])
    assert "RuntimeError: of the list" in outcome.error or not isinstance(value, Numbers)
    if isinstance(value, tuple):
        assert outcome.reward == 1.0 and outcome.metrics == {"('a', 1)": 2.0}
    else:
        assert outcome.reward is None and outcome.error


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, KeyboardInterrupt])
def test_anything_that_a_reward_function_raises_is_a_failed_attempt(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def reward(prompt: str, response: str, row: dict[str, Any]) -> float:
        raise error("of the function")

    monkeypatch.setattr(scoring_process, "_function", reward)
    outcome = scoring_process.score_custom("", "", {}, [])
    assert outcome.reward is None
    assert outcome.error.startswith(f"{error.__name__}: of the function")
