"""Starts, watches and stops the SGLang server, a child process in an environment of its own.

On a CPU the stock server runs with patches/sglang_cpu (reasons in patches/README.md). Its keys are
in a file that only this user can read, never on its command line.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_async_rl import installed, processes
from megatron_async_rl.addresses import free_port
from megatron_async_rl.config.checks import ENGINE_SPARE_TOKENS, GRAPH_SIZES
from megatron_async_rl.config.config import Config
from megatron_async_rl.engine_env import ENGINE_VARIABLE, engine_python
from megatron_async_rl.errors import ConfigError, EngineError
from megatron_async_rl.model.engine.block_fp8 import quantization_config
from megatron_async_rl.model.engine.engine_types import convolution_dtype
from megatron_async_rl.patches import patches_dir
from megatron_async_rl.rollout.engine_client import EngineClient
from megatron_async_rl.storage import snapshots

POLL_S = 0.25
START_TRIES = 3  # another process may take the chosen port before the server binds it
_NAMES_ERROR = re.compile(r"\w*(Error|Exception)\b|\berror:")


class SGLangServer:
    """One SGLang server; `client` is set once `start` has returned."""

    client: EngineClient

    def __init__(
        self, config: Config, run_dir: Path, name: str, temporary: Path | None = None
    ) -> None:
        """`temporary`: for the server's temporary files; None: where this process has its own."""
        self._variables = processes.temporary_environment(temporary) if temporary else {}
        self._config = config
        self._run_dir = run_dir
        self._name = name
        self._log = run_dir / "logs" / f"{name}.sglang.log"
        self._keys = run_dir / "keys" / f"{name}.sglang.yaml"
        self._log_start = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._model_path = Path(config.model.path)
        self._quantization_config = quantization_config(config)
        self._convolution_dtype = convolution_dtype(config)
        self.started_from: Path | None = None  # the snapshot (storage/snapshots.py) it loaded
        python = engine_python()
        if python is None:
            raise ConfigError(
                f"no engine environment: run `bash tools/setup_env.sh`, or set {ENGINE_VARIABLE}"
            )
        self._python = python

    async def start(self) -> None:
        """Starts the server with the run's newest snapshot, else with model.path.

        Returns once it answers. Raises EngineError with its last log lines if it does not.
        """
        newest = None
        if "load_format" not in self._config.sglang:
            found = snapshots.list_snapshots(self._run_dir)
            wanted = self._quantization_config
            newest = next((s for s in found if s.manifest.quantization_config == wanted), None)
        # held: the controller may remove the snapshot while the server is loading it
        held = snapshots.hold(newest, self._name) if newest else None
        try:
            for attempt in range(1, START_TRIES + 1):
                self._model_path = held or Path(self._config.model.path)
                self.started_from = newest.path if newest and held else None
                port = int(self._config.sglang.get("port", free_port()))
                try:
                    await self._start_on(port)
                    return
                except EngineError:
                    await self.stop()  # one of an unsupported version still runs
                    lost_port = self._lost_port()
                    can_retry = held or (lost_port and "port" not in self._config.sglang)
                    if not can_retry or attempt == START_TRIES:
                        raise
                    held = held if lost_port else None  # else the snapshot may be the reason
        finally:
            if newest:
                snapshots.release(newest, self._name)

    async def watch(self) -> None:
        """Waits until the server ends, and then raises EngineError."""
        assert self._child
        code = await asyncio.to_thread(self._child.wait)
        raise self._error(f"ended with exit code {code}")

    async def stop(self) -> None:
        if hasattr(self, "client"):
            await self.client.close()
        if self._child:
            processes.stop([self._child], 0.0)
            self._child = None

    async def _start_on(self, port: int) -> None:
        # hex: a key that begins with "-" would be parsed as a flag
        api_key, admin_key = secrets.token_hex(32), secrets.token_hex(32)
        self._keys.touch(mode=0o600)
        self._keys.write_text(yaml.safe_dump({"api-key": api_key, "admin-api-key": admin_key}))
        host = str(self._config.sglang.get("host", "127.0.0.1"))
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._child = processes.start(
            self._command(host, port),
            self._log,
            self._environment() | self._variables,
            sigterm_blocked=True,
        )
        rollout = self._config.rollout
        self.client = EngineClient(
            f"http://{host}:{port}",
            api_key,
            admin_key,
            rollout.request_timeout_s,
            rollout.lease_timeout_s,
        )
        deadline = time.monotonic() + rollout.start_timeout_s
        while not await self.client.is_healthy():
            reason = ""
            if (code := self._child.poll()) is not None:
                reason = f"ended with exit code {code}"
            elif self._lost_port():
                reason = f"lost its port {port} to another process"
            elif time.monotonic() > deadline:
                limit_s = rollout.start_timeout_s
                reason = f"did not start within rollout.start_timeout_s = {limit_s:.0f}"
            if reason:
                await self.stop()
                raise self._error(reason)
            await asyncio.sleep(POLL_S)
        await self.client.connect()

    def _lost_port(self) -> bool:
        """Returns whether another process took the port before this server bound it.

        The server logs that, and may then hang instead of ending.
        """
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return b"address already in use" in log.read().lower()

    def _command(self, host: str, port: int) -> list[str]:
        module = "launch" if self._config.on_cpu else "sglang.launch_server"
        own: dict[str, Any] = {
            "model_path": str(self._model_path),
            "weight_version": self.started_from and snapshots.version_of(self.started_from),
            "host": host,
            "port": port,
            "config": str(self._keys),
            # only stop texts need the server's tokenizer, of the run or of an agent's requests;
            # snapshots have none
            "skip_tokenizer_init": not (self._config.rollout.stop or self._config.has_agent),
            "tokenizer_path": self._config.model.path,
            "log_level": "warning",  # at info, SGLang logs its keys
            "grammar_backend": "none",
            # a CPU has no kernels to warm up, and the warm-up begins with a wait of a second
            "skip_server_warmup": self._config.on_cpu,
            # on a CPU, an idle scheduler would occupy one of the cores that the others need
            "sleep_on_idle": self._config.on_cpu,
            # on a CPU, SGLang's cache of linear attention's states needs it
            "disable_overlap_schedule": bool(self._config.on_cpu and self._convolution_dtype),
            # stored among the others, they would have other digests
            "disable_shared_experts_fusion": True,
            "enable_return_routed_experts": self._config.rollout.routing_replay,
            # SGLang keeps the last tokens of its context free; ours are filled to the last one
            "context_length": self._config.model.context_tokens + ENGINE_SPARE_TOKENS,
            **self._graph_size(),
        }
        flags: list[str] = []
        for key, value in {**own, **self._config.sglang, **self._quantization()}.items():
            flag = "--" + key.replace("_", "-")
            if value is True:
                flags.append(flag)
            elif isinstance(value, list):
                flags += [flag, *map(str, value)]
            elif value is not False and value is not None:
                flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
        return [str(self._python), "-m", module, *flags]

    def _quantization(self) -> dict[str, Any]:
        """Returns the settings of a server that computes with fp8 weights of the trainer.

        model.path has none: without a snapshot it starts with random weights until version 0.
        """
        if not self._quantization_config:
            return {}
        overrides = self._config.sglang.get("json_model_override_args", {})
        overrides = json.loads(overrides) if isinstance(overrides, str) else overrides
        overrides = overrides | {"quantization_config": self._quantization_config}
        load_format = {} if self.started_from else {"load_format": "dummy"}
        return {"json_model_override_args": overrides} | load_format

    def _graph_size(self) -> dict[str, int]:
        """Returns the decode graph size that holds all samples in flight, on a GPU.

        Larger batches would decode without graphs, at a third of the speed.
        """
        keys = ("cuda_graph_config", *GRAPH_SIZES)
        chosen = any(self._config.sglang.get(key) is not None for key in keys)
        if self._config.on_cpu or chosen:
            return {}
        known = installed.engine_settings(self._python).settings
        names = ("cuda_graph_max_bs_decode", "cuda_graph_max_bs")  # differs between versions
        name = next((name for name in names if name in known), None)
        return {name: self._config.rollout.max_concurrent_samples} if name else {}

    def _environment(self) -> dict[str, str]:
        patches = ["sglang_startup", *(["sglang_cpu"] if self._config.on_cpu else [])]
        environment = {
            "NCCL_CUMEM_ENABLE": "0",  # SGLang sets it; both ends of an update group must agree
            "HF_HUB_OFFLINE": "1",
            # for ENGINE_SPARE_TOKENS, which are never used; model.context_tokens itself is checked
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            "PYTHONPATH": os.pathsep.join(str(patches_dir() / name) for name in patches),
            # /health must not generate between updates
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        }
        if self._convolution_dtype:  # its default is bfloat16, which would round others
            environment["SGLANG_MAMBA_CONV_DTYPE"] = self._convolution_dtype
        if self._config.on_cpu:
            environment |= {
                "SGLANG_USE_CPU_ENGINE": "1",
                "SGLANG_EXTERNAL_MODEL_PACKAGE": "cpu_models",
                "OMP_NUM_THREADS": "1",  # more threads decode a small model several times slower
            }
            if self._config.engine_tp > 1:  # else SGLang requires a NUMA node per rank
                cores = os.cpu_count() or 1
                environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
                    str(rank % cores) for rank in range(self._config.engine_tp)
                )
        return environment

    def _error(self, reason: str) -> EngineError:
        """Quotes the last log line that names an error (more may follow) or the last lines."""
        lines = [line[:600] for line in processes.log_end(self._log, self._log_start)]
        errors = [line for line in lines if _NAMES_ERROR.search(line)]
        shown = errors[-1] if errors else "\n".join(lines[-8:])
        return EngineError(f"the SGLang server {reason}; its log: {self._log}\n{shown}")
