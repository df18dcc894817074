"""The tutorial on agents: its agent runs against the endpoint, its YAML is a configuration."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
import yaml
from agent_endpoint import serving
from char_tokenizer import make_chat_folder
from config_builders import config_tree
from paths import ROOT

from megatron_async_rl import hooks
from megatron_async_rl.config import load
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.protocol.types import Sample, turn_texts
from megatron_async_rl.rollout.agents.runner import FunctionRunner
from megatron_async_rl.rollout.agents.transcript import Returned

PAGE = (ROOT / "docs" / "agents.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_agent_of_the_page_converses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_agent.py").write_text("\n".join(blocks("python")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    tokenizer = Tokenizer(make_chat_folder(tmp_path / "model"))

    async def run(agent: str, row: dict[str, str], *texts: str) -> tuple[Returned, Sample]:
        async with serving(tokenizer, *texts) as served:
            runner = FunctionRunner(f"my_agent:{agent}", tmp_path / "log")
            returned = await runner.run(row, served.client_settings())
            await runner.stop()
            served.session.rewards.give(returned, len(served.session.transcript.turns))
            return returned, served.sample()

    returned, sample = asyncio.run(run("solve", {"prompt": "2+3"}, "five", "5"))
    assert returned is sample.reward is None and not sample.starts
    assert turn_texts(sample.text, sample.text_ends) == ["five", "5"]
    returned, sample = asyncio.run(run("play", {"answer": "7"}, "50", "60", "7"))
    assert returned == [0.1, 0.0, 1.0]
    assert (sample.turn_rewards, sample.reward) == ([0.1, 0.0, 0.0], 1.0)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configuration_of_the_page_is_valid(text: str) -> None:
    tree = config_tree()
    for section, values in yaml.safe_load(text).items():
        tree[section] |= values
    config = load.from_tree(tree)
    assert config.has_agent and config.max_sequences > 1


def test_agent_of_the_example_is_told_that_it_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    agent = load.load(ROOT / "configs" / "agent.yaml").rollout.agent
    assert agent
    solve = hooks.load("rollout.agent", agent)
    tokenizer = Tokenizer(make_chat_folder(tmp_path / "model"))

    async def run(*texts: str) -> tuple[float, Sample]:
        async with serving(tokenizer, *texts) as served:
            client = served.client_settings()
            for name, value in client.environment().items():
                monkeypatch.setenv(name, value)
            row = {"prompt": "2+3=", "answer": "5"}
            return await asyncio.to_thread(solve, row, client), served.sample()

    assert asyncio.run(run("\\boxed{5}"))[0] == 1.0
    reward, sample = asyncio.run(run("\\boxed{4}", "\\boxed{5}"))
    assert reward == 0.8 and not sample.starts
    assert "Wrong." in tokenizer.decode_all(sample.ids.tolist())
    assert asyncio.run(run("4", "5"))[0] == 0.0
