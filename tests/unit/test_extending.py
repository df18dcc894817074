"""The examples of docs/extending.md, taken from the page, work and keep the contract."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_builders import config_tree
from paths import ROOT

from megatron_async_rl import hooks
from megatron_async_rl.cli.hook_checks import advantage_checks
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.filters import filter_rules
from megatron_async_rl.protocol.types import Prompt, Segment
from megatron_async_rl.rollout.workflow import Completion
from megatron_async_rl.trainer.algorithms import contract

PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, code in EXAMPLES.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in EXAMPLES:
        sys.modules.pop(name, None)


def config_with(**changes: Any) -> Config:
    return configuration.from_tree(config_tree(**changes))


def test_page_has_an_example_of_each_hook_and_its_signature() -> None:
    assert len(EXAMPLES) == 6
    signature = re.compile(r"^\| `(\w+\.[\w.]+)` \| [^(\n]*\((?:self, )?([\w, ]+)\)", re.M)
    rows = dict(signature.findall(PAGE))
    for setting in {*rows, *hooks.HOOKS}:
        assert rows[setting] == ", ".join(hooks.HOOKS[setting].parameters), setting


@pytest.mark.parametrize("function", ["median_centered", "centered_turns", "discounted"])
def test_advantages(function: str) -> None:
    changes = {"estimator": f"my_advantages:{function}", "options": {"gamma": 0.99}}
    config = config_with(**{"algorithm.advantage": changes})
    assert set(dict(advantage_checks(config.algorithm)).values()) == {""}


@pytest.mark.parametrize("function", ["smooth_ppo", "sequence_reinforce"])
def test_objectives(function: str) -> None:
    changes = {"objective": f"my_loss:{function}", "options": {"width": 0.3}}
    config = config_with(**{"algorithm.loss": changes})
    assert set(dict(contract.objective_checks(config.algorithm)).values()) == {""}
    assert contract.sign_note(config.algorithm) == ""


def test_filter() -> None:
    changes = {"function": "my_filter:mostly_complete", "options": {"max_tokens": 1000}}
    config = config_with(**{"algorithm.filters": changes})
    [(_, keeps)] = filter_rules(config.algorithm.filters)
    assert keeps([1.0, 0.0], [10, 1000], {}) and not keeps([1.0, 0.0], [1000, 1000], {})


def test_reward() -> None:
    reward = hooks.load("reward.function", "my_reward:short_and_right")
    row = {"answer": "42"}
    assert reward("", "It is 42.", row) > reward("", "It is 42." + " " * 500, row) > 0.5
    assert reward("", "It is 41.", row) == 0


def test_reader(tmp_path: Path) -> None:
    (tmp_path / "problems.csv").write_text("question,solution\nWhat is 2+2?,4\nAnd 3+3?,6\n")
    path = str(tmp_path / "problems.csv")
    config = config_with(data={"train": path, "reader": "my_reader:read"})
    reader = hooks.load("data.reader", "my_reader:read")
    assert list(reader(path, config.data.train)) == [
        {"prompt": "What is 2+2?", "answer": "4"},
        {"prompt": "And 3+3?", "answer": "6"},
    ]


class Letters:
    """A policy that answers with one token of the version that each call finds."""

    class tokenizer:
        @staticmethod
        def decode(ids: list[int]) -> str:
            return " ".join(map(str, ids))

    def __init__(self) -> None:
        self.inputs: list[list[int]] = []

    async def generate(self, ids: list[int], sampling: Any) -> Completion:
        self.inputs.append(list(ids))
        number = len(self.inputs)
        return Completion([Segment(number, [100 + number], [-0.5])], "stop")

    def next_turn(self, prompt: Prompt, turn: Completion, messages: Any) -> np.ndarray:
        assert messages[0]["role"] == "user"
        return np.array([7, 8], np.int32)


def test_workflow() -> None:
    workflow, policy = hooks.load("rollout.workflow", "my_workflow:CheckTwice")(), Letters()
    prompt = Prompt("0", np.array([1, 2], np.int32), {})
    sample = asyncio.run(workflow.run(prompt, policy, None))
    assert policy.inputs == [[1, 2], [1, 2, 101, 7, 8]]
    assert sample.ids.tolist() == [1, 2, 101, 7, 8, 102] and sample.text == "102"
    assert sample.versions.tolist() == [-1, -1, 1, -1, -1, 2]
