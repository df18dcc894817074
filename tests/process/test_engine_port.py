"""A server is started again at once when its port is taken between its choice and its use."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import pytest
from needs import needs_engine
from tiny_model import CPU_ENGINE, make_model

from megatron_async_rl.config import load as configuration
from megatron_async_rl.errors import EngineError
from megatron_async_rl.rollout import engine_process as module
from megatron_async_rl.rollout.engine_process import SGLangServer

pytestmark = needs_engine


def make_engine(folder: Path, **sglang: object) -> SGLangServer:
    (folder / "run" / "logs").mkdir(parents=True)
    (folder / "run" / "keys").mkdir()
    tree = {
        "run": {"dir": str(folder / "run"), "steps": 1},
        "model": {"path": str(make_model(folder / "model")), "context_tokens": 64},
        "data": {"train": "none"},
        "rollout": {"max_new_tokens": 8, "start_timeout_s": 200},
        "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
        "sglang": CPU_ENGINE | sglang,
    }
    return SGLangServer(configuration.from_tree(tree), folder / "run", "rollout-0")


def test_server_retries_when_its_port_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_engine(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = module.free_port
        ports = iter([taken.getsockname()[1]])
        monkeypatch.setattr(module, "free_port", lambda: next(ports, None) or free())

        async def body() -> None:
            try:
                await server.start()
                assert await server.client.is_healthy()
            finally:
                await server.stop()

        started = time.monotonic()
        asyncio.run(body())
    assert next(ports, None) is None
    assert (
        "address already in use"
        in (tmp_path / "run" / "logs" / "rollout-0.sglang.log").read_text().lower()
    )
    assert time.monotonic() - started < 200  # the time of two starts, less than start_timeout_s


def test_error_names_the_configured_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = make_engine(tmp_path, port=port)
        with pytest.raises(EngineError, match=f"lost its port {port}|exit code"):
            asyncio.run(server.start())
