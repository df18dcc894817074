"""The command line of an SGLang server."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from config_builders import config_tree
from model_shapes import make_model_folder

from megatron_async_rl.config import load
from megatron_async_rl.engine_env import ENGINE_VARIABLE
from megatron_async_rl.errors import EngineError
from megatron_async_rl.rollout import engine_process
from megatron_async_rl.rollout.engine_process import SGLangServer
from megatron_async_rl.storage import snapshots
from megatron_async_rl.storage.snapshots import SnapshotManifest

OLD_SERVER = f"""#!{sys.executable} -IS
import http.server, os, sys
from pathlib import Path

starts = Path(__file__).with_name("starts")
earlier = starts.read_text().split() if starts.exists() else []
alive = [pid for pid in earlier if Path("/proc", pid).exists()]
starts.write_text(" ".join([*earlier, str(os.getpid()), *(["alive"] * len(alive))]))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{{"version": "0.1.0"}}')

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


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

    model = make_model_folder(tmp_path / "any", "llama")

    def command(settings: dict[str, Any] | None = None, **sglang: Any) -> list[str]:
        settings = {
            "rollout.max_concurrent_samples": 384,
            "model.path": str(model),
        } | (settings or {})
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
    assert "--cuda-graph-max-bs-decode" not in flags(cuda_graph_bs_decode=[1, 8])
    for other in ({"cuda_graph_max_bs_prefill": 8}, {"cuda_graph_bs_decode": None}):
        assert value_of(flags(**other), "--cuda-graph-max-bs-decode") == "384"


def test_server_has_a_tokenizer_where_stop_texts_may_come(flags: Any) -> None:
    assert "--skip-tokenizer-init" in flags(device="cpu")
    for setting, value in (("rollout.stop", ["x"]), ("rollout.agent", "module:function")):
        assert "--skip-tokenizer-init" not in flags({setting: value}, device="cpu")


def test_fp8_server_starts_without_weights_and_with_the_format(flags: Any, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", "qwen3_moe of blocks")
    settings = {"model.path": str(model), "weights.quantization": "fp8_block"}
    command = flags(settings, json_model_override_args='{"rope_theta": 7}', device="cpu")
    assert value_of(command, "--load-format") == "dummy"
    overrides = json.loads(value_of(command, "--json-model-override-args"))
    assert overrides["rope_theta"] == 7
    quantization = overrides["quantization_config"]
    assert quantization["quant_method"] == "fp8"
    assert quantization["weight_block_size"] == [128, 128]
    plain = quantization["modules_to_not_convert"]
    assert plain == [
        "lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"
    ]  # fmt: skip
    without_trainer = flags(settings | {"run.mode": "rollout_only"}, device="cpu")
    assert not {"--load-format", "--json-model-override-args"} & {*without_trainer}


def test_values_of_each_type_become_flags(flags: Any) -> None:
    command = flags(device="cpu", a_list=[1, 2], a_map={"x": [1]}, yes=True, no=False, none=None)
    assert command[command.index("--a-list") :][:3] == ["--a-list", "1", "2"]
    assert value_of(command, "--a-map") == '{"x": [1]}'
    assert "--yes" in command
    assert not {"--no", "--none"} & {*command}


def test_server_of_an_old_version_is_stopped_before_another_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(OLD_SERVER)
    python.chmod(0o755)
    monkeypatch.setenv(ENGINE_VARIABLE, str(python))
    monkeypatch.setattr(engine_process, "POLL_S", 0.02)
    model = make_model_folder(tmp_path / "model", "llama")
    for folder in ("logs", "keys"):
        (tmp_path / folder).mkdir()
    manifest = SnapshotManifest(0, {}, 1, "sha256", {})
    snapshots.commit(snapshots.begin(tmp_path, 0), [], manifest, model)
    tree = config_tree(sglang={"device": "cpu"}, **{"model.path": str(model)})

    async def start() -> None:
        server = SGLangServer(load.from_tree(tree), tmp_path, "rollout-0")
        try:
            await server.start()
        finally:
            await server.stop()

    with pytest.raises(EngineError, match=r"SGLang 0\.1\.0 is outside the supported"):
        asyncio.run(start())
    first, second = (tmp_path / "starts").read_text().split()
    assert first != second
