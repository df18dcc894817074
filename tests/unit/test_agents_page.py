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

from megatron_async_rl.config import load
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.rollout.agents import chat
from megatron_async_rl.rollout.agents.client import ClientSettings
from megatron_async_rl.rollout.agents.runner import FunctionRunner

PAGE = (ROOT / "docs" / "agents.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_agent_of_the_page_converses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = blocks("python")
    (tmp_path / "my_agent.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    tokenizer = Tokenizer(make_chat_folder(tmp_path / "model"))

    async def run() -> list[str]:
        async with serving(tokenizer, "five", "5") as served:
            runner = FunctionRunner("my_agent:solve", tmp_path / "log")
            url = served.endpoint.url
            client = ClientSettings(f"{url}/v1", served.session.key, url, chat.MODEL)
            assert await runner.run({"prompt": "2+3"}, client) is None
            await runner.stop()
            assert not served.sample().starts
            return [turn.raw for turn in served.session.transcript.turns]

    assert asyncio.run(run()) == ["five", "5"]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configuration_of_the_page_is_valid(text: str) -> None:
    tree = config_tree()
    config = load.from_tree(tree | {"rollout": tree["rollout"] | yaml.safe_load(text)["rollout"]})
    assert config.has_agent and config.max_sequences > 1
