"""The command line of an SGLang server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_builders import config_tree

from megatron_async_rl.config import load
from megatron_async_rl.engine_env import ENGINE_VARIABLE
from megatron_async_rl.rollout.engine_process import SGLangServer


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function from `sglang:` and other settings to the flags of an engine."""
    python = tmp_path / "python"
    known = json.dumps({"cuda_graph_max_bs_decode": {"types": ["int"]}})
    answer = f"case \"$3\" in *ServerArgs*) echo '{known}';; *) echo 1;; esac"
    python.write_text(f"#!/bin/sh\n{answer}\n")
    python.chmod(0o755)
    monkeypatch.setenv(ENGINE_VARIABLE, str(python))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MEGATRON_ASYNC_RL_CACHE", raising=False)

    def command(settings: dict[str, Any] | None = None, **sglang: Any) -> list[str]:
        settings = {"rollout.max_concurrent_samples": 384} | (settings or {})
        tree = config_tree(sglang=sglang, **settings)
        server = SGLangServer(load.from_tree(tree), tmp_path, "rollout-0")
        return server._command("127.0.0.1", 30000)

    return command


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_context_of_the_server_has_room_for_the_last_tokens(flags: Any) -> None:
    assert value_of(flags(device="cpu"), "--context-length") == str(128 + 8)


def test_decode_graphs_hold_all_samples_in_flight(flags: Any) -> None:
    assert value_of(flags(), "--cuda-graph-max-bs-decode") == "384"
    assert value_of(flags(cuda_graph_max_bs_decode=64), "--cuda-graph-max-bs-decode") == "64"
    assert "--cuda-graph-max-bs-decode" not in flags(device="cpu")


def test_server_has_a_tokenizer_where_stop_texts_may_come(flags: Any) -> None:
    assert "--skip-tokenizer-init" in flags(device="cpu")
    for setting, value in (("rollout.stop", ["x"]), ("rollout.agent", "module:function")):
        assert "--skip-tokenizer-init" not in flags({setting: value}, device="cpu")


def test_values_of_each_type_become_flags(flags: Any) -> None:
    command = flags(device="cpu", a_list=[1, 2], a_map={"x": [1]}, yes=True, no=False, none=None)
    assert command[command.index("--a-list") :][:3] == ["--a-list", "1", "2"]
    assert value_of(command, "--a-map") == '{"x": [1]}'
    assert "--yes" in command
    assert not {"--no", "--none"} & {*command}
