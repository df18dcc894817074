"""Parts of the benchmarks: command lines, folders of runs, servers, whole runs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_async_rl import processes
from megatron_async_rl.config.config import Config
from megatron_async_rl.rollout.engine_process import SGLangServer

CPU_ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.1,
    "max_total_tokens": 65536,
    "disable_overlap_schedule": True,
}
GPU_ENGINE = {
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.7,
}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser that prints the description unchanged in its help."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def make_run_folder(folder: Path) -> Path:
    """Makes the files that the processes of a run expect in run.dir."""
    for name in ("logs", "keys"):
        (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


@asynccontextmanager
async def running_server(
    config: Config, run_dir: Path, temporary: Path | None = None
) -> AsyncIterator[SGLangServer]:
    """Starts a server; its weights are version 0 (a new server calls them "default")."""
    server = SGLangServer(config, make_run_folder(run_dir), "rollout-0", temporary)
    try:
        await server.start()
        await server.client.relabel(0)
        yield server
    finally:
        await server.stop()


async def memory_of(server: SGLangServer) -> dict[str, Any]:
    """Returns the GPU memory that the server reports: GiB, and tokens of its KV cache."""
    info = await server.client._call("GET", "/server_info", None, server.client._api)
    return info["internal_states"][0].get("memory_usage", {})


def start_run(
    config: Path, overrides: list[str], output: TextIO | None = None, **variables: str
) -> subprocess.Popen[bytes]:
    """Starts `run` from scratch; it finds the modules of this folder, such as planted_lengths."""
    path = os.pathsep.join([processes.python_path(), str(Path(__file__).parent)])
    command = [sys.executable, "-m", "megatron_async_rl", "run", str(config), "--from-scratch"]
    return subprocess.Popen(
        [*command, *overrides],
        env=os.environ | variables | {"PYTHONPATH": path},
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
    )
