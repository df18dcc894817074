"""The SGLang server as a child: started in its own environment, watched, stopped.

Nothing of ours imports sglang. On a CPU the stock server runs through patches/sglang_cpu (patches/README.md says why).
Its keys lie in a file that only this user can read, never on its command line.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_async_rl import processes
from megatron_async_rl.config.config import Config
from megatron_async_rl.engine_env import engine_python
from megatron_async_rl.errors import ConfigError, EngineError
from megatron_async_rl.patches import patches_dir
from megatron_async_rl.protocol.transport import free_port
from megatron_async_rl.rollout.engine_client import EngineClient
from megatron_async_rl.storage import snapshots

POLL_S = 0.25
_NAMES_ERROR = re.compile(r"\w*(Error|Exception)\b|\berror:")
START_TRIES = 3  # a port taken between choosing and binding is no reason to give up


class Server:
    """One SGLang server; `client` speaks to it once `start` has returned."""

    client: EngineClient

    def __init__(self, config: Config, run_dir: Path, name: str) -> None:
        self._config = config
        self._log = run_dir / "logs" / f"{name}.sglang.log"
        self._keys = run_dir / "keys" / f"{name}.sglang.yaml"
        self._log_start = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._run_dir = run_dir
        self._name = name
        self._model_path = Path(config.model.path)
        self.started_from: Path | None = (
            None  # the snapshot (snapshots.py) whose weights it began with
        )
        python = engine_python()
        if python is None:
            raise ConfigError(
                "no engine environment: run `bash tools/setup_env.sh`, or set MEGATRON_ASYNC_RL_ENGINE_PYTHON"
            )
        self._python = python

    async def start(self) -> None:
        """Returns when the server answers. Raises EngineError with its last words when it does not come up.

        It begins with the newest weights that the run has on disk, else with model.path.
        """
        newest = (
            None
            if "load_format" in self._config.sglang
            else next(iter(snapshots.whole(self._run_dir)), None)
        )
        held = (
            snapshots.hold(newest, self._name) if newest else None
        )  # versions come and go while it starts
        try:
            for attempt in range(1, START_TRIES + 1):
                self._model_path = held or Path(self._config.model.path)
                self.started_from = newest.path if newest and held else None
                port = int(self._config.sglang.get("port", free_port()))
                try:
                    await self._start_on(port)
                    return
                except EngineError:
                    lost_port = self._lost_port()
                    try_again = held or (lost_port and "port" not in self._config.sglang)
                    if not try_again or attempt == START_TRIES:
                        raise
                    held = held if lost_port else None
        finally:
            if newest:
                snapshots.release(newest, self._name)

    async def watch(self) -> None:
        """Returns never. Raises EngineError when the server ends."""
        assert self._child
        code = await asyncio.to_thread(self._child.wait)
        raise EngineError(
            f"the SGLang server ended with exit code {code}; its log: {self._log}\n{_last_words(self._log)}"
        )

    async def stop(self) -> None:
        if hasattr(self, "client"):
            await self.client.close()
        if self._child:
            processes.stop([self._child], 0.0)
            self._child = None

    async def _start_on(self, port: int) -> None:
        api_key, admin_key = (
            secrets.token_hex(32),
            secrets.token_hex(32),
        )  # urlsafe may begin with '-': taken for a flag
        self._keys.touch(mode=0o600)
        self._keys.write_text(yaml.safe_dump({"api-key": api_key, "admin-api-key": admin_key}))
        host = str(self._config.sglang.get("host", "127.0.0.1"))
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._child = processes.start(
            self._command(host, port), self._log, self._environment(), sigterm_blocked=True
        )
        self.client = EngineClient(
            f"http://{host}:{port}",
            api_key,
            admin_key,
            self._config.rollout.request_timeout_s,
            self._config.rollout.lease_timeout_s,
        )
        limit_s = self._config.rollout.start_timeout_s
        deadline = time.monotonic() + limit_s
        while not await self.client.healthy():
            code, lost_port = self._child.poll(), self._lost_port()
            if code is not None or lost_port or time.monotonic() > deadline:
                why = f"did not start within rollout.start_timeout_s = {limit_s:.0f}"
                if code is not None:
                    why = f"ended with exit code {code}"
                elif lost_port:
                    why = f"lost its port {port} to somebody else"
                await self.stop()
                raise EngineError(
                    f"the SGLang server {why}; its log: {self._log}\n{_last_words(self._log)}"
                )
            await asyncio.sleep(POLL_S)
        await self.client.connect()

    def _lost_port(self) -> bool:
        """Somebody took its port between our choosing and its binding. It says so, and may then hang instead of ending."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)  # what follows is this start's
            return b"address already in use" in log.read().lower()

    def _command(self, host: str, port: int) -> list[str]:
        module = "launch" if self._config.on_cpu else "sglang.launch_server"
        ours: dict[str, Any] = {
            "model_path": str(self._model_path),
            "weight_version": self.started_from and snapshots.version_of(self.started_from),
            "host": host,
            "port": port,
            "config": str(self._keys),
            "skip_tokenizer_init": True,
            "log_level": "warning",  # at info, SGLang logs its keys
            "grammar_backend": "none",
            "context_length": self._config.model.context_tokens,
        }
        flags: list[str] = []
        for key, value in {**ours, **self._config.sglang}.items():
            flag = "--" + key.replace("_", "-")
            if value is True:
                flags.append(flag)
            elif value is not False and value is not None:
                flags += [flag, str(value)]
        return [str(self._python), "-m", module, *flags]

    def _environment(self) -> dict[str, str]:
        environment = {
            "NCCL_CUMEM_ENABLE": "0",  # SGLang sets it; both ends of an update group must agree
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(patches_dir() / "sglang_startup"),
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # /health must not generate between updates
        }
        if self._config.on_cpu:
            environment |= {
                "PYTHONPATH": os.pathsep.join(
                    str(patches_dir() / name) for name in ("sglang_startup", "sglang_cpu")
                ),
                "SGLANG_USE_CPU_ENGINE": "1",
                "SGLANG_EXTERNAL_MODEL_PACKAGE": "cpu_models",
                "OMP_NUM_THREADS": "1",  # more threads decode a small model several times slower
            }
            if (
                tp := self._config.engine_tp
            ) > 1:  # SGLang wants a NUMA node per rank, or to be told
                cores = os.cpu_count() or 1
                environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
                    str(rank % cores) for rank in range(tp)
                )
        return environment


def _last_words(log: Path) -> str:
    """What the server said of its end: its last line that names an error, else its last lines; noise may follow one."""
    lines = (
        [line[:600] for line in log.read_text(errors="replace").splitlines()]
        if log.exists()
        else []
    )
    named = [number for number, line in enumerate(lines) if _NAMES_ERROR.search(line)]
    return lines[named[-1]] if named else "\n".join(lines[-8:])
