"""What a configuration asks of this host, of its model and of its dataset: a Check for each, before anything is started."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from packaging.specifiers import SpecifierSet

from megatron_async_rl.config.checks import cross_host_parallelism_warning
from megatron_async_rl.config.config import Config
from megatron_async_rl.data.code_tests import read_tests
from megatron_async_rl.engine_env import ENGINE_VARIABLE, engine_python
from megatron_async_rl.errors import ConfigError, DataError, Error
from megatron_async_rl.sandbox.sandbox import Sandbox, SandboxError, SandboxSettings

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
GIB = 1 << 30


class Check(msgspec.Struct, frozen=True):
    name: str
    ok: bool
    detail: str  # what was found; with a config: key = value and the rule it breaks
    remedy: str = ""  # what to type, where not ok


class ModelFolder(msgspec.Struct, frozen=True):
    """What the checks need of a model's config.json."""

    architectures: list[str]
    num_attention_heads: int
    num_hidden_layers: int
    num_key_value_heads: int | None = None  # none: one per attention head
    num_experts: int = 0
    max_position_embeddings: int | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None  # its name since transformers 5

    @property
    def num_kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def scales_rope(self) -> bool:
        """Then it reads further than max_position_embeddings says."""
        rope = self.rope_scaling or self.rope_parameters or {}
        return rope.get("rope_type", rope.get("type", "default")) != "default"


def config_checks(config: Config) -> Iterator[tuple[Check, type[Error]]]:
    """What a config asks for, each with the error that `preflight` makes of it."""
    folder, model = _model_folder(config)
    yield folder, DataError
    if model is not None:
        yield _architecture(config, model), DataError
        yield _trainer_layout(config, model), ConfigError
        yield _engine_layout(config, model), ConfigError
        yield _context(config, model), ConfigError
    yield _dataset("data.train", config.data.train, config), DataError
    if config.data.eval is not None:
        yield _dataset("data.eval", config.data.eval, config), DataError
    if config.reward.function == "code":
        yield _sandbox(config), ConfigError
    yield _controller_host(config), ConfigError
    yield _engine_port(config), ConfigError


def _model_folder(config: Config) -> tuple[Check, ModelFolder | None]:
    path = Path(config.model.path)
    key = f"model.path = {path}"
    remedy = (
        f"the quickstart's model: python tools/make_tiny_model.py {path}; "
        f"another: hf download OWNER/NAME --local-dir {path}"
    )
    if not path.is_dir():
        return Check("model", False, f"{key}: no such folder", remedy), None
    missing = [name for name in ("config.json", "tokenizer.json") if not (path / name).is_file()]
    missing += [] if any(path.glob("*.safetensors")) else ["*.safetensors"]
    index = path / "model.safetensors.index.json"
    try:
        if index.is_file():
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
            missing += sorted(name for name in shards if not (path / name).is_file())
        if missing:
            return Check("model", False, f"{key}: {', '.join(missing)} not in it", remedy), None
        model = msgspec.json.decode((path / "config.json").read_bytes(), type=ModelFolder)
    except (OSError, ValueError, KeyError, AttributeError) as e:  # msgspec's errors are ValueErrors
        return Check(
            "model", False, f"{key}: not a Hugging Face folder of a decoder: {e}", remedy
        ), None
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return Check(
        "model", True, f"{path}: {model.num_hidden_layers} layers, {size_text(size)}"
    ), model


def _architecture(config: Config, model: ModelFolder) -> Check:
    names = ", ".join(model.architectures) or "none"
    if not set(model.architectures) & set(ARCHITECTURES):
        detail = f"model.path = {config.model.path}: its architecture is {names}"
        return Check(
            "architecture", False, detail, f"use a model of one of {', '.join(ARCHITECTURES)}"
        )
    return Check("architecture", True, names)


def _trainer_layout(config: Config, model: ModelFolder) -> Check:
    for name, parts in (
        (
            "tensor_model",
            {"attention heads": model.num_attention_heads, "KV heads": model.num_kv_heads},
        ),
        ("pipeline_model", {"layers": model.num_hidden_layers}),
        ("expert_model", {"experts": model.num_experts}),
    ):
        size = config.parallel_size(name)
        for what, count in parts.items():
            if size > 1 and (not count or count % size):
                detail = f"megatron.{name}_parallel_size = {size} does not divide the model's {count} {what}"
                fitting = ", ".join(map(str, _common_divisors(*parts.values())))
                return Check(
                    "trainer layout",
                    False,
                    detail,
                    f"set megatron.{name}_parallel_size to one of {fitting}",
                )
    sizes = {
        name: config.parallel_size(f"{name}_model") for name in ("tensor", "pipeline", "expert")
    }
    detail = f"{config.trainer_ranks} ranks: {', '.join(f'{k} {v}' for k, v in sizes.items())}"
    if len(config.trainer_names) > 1:
        detail += f"; {config.ranks_per_host} on each of {config.trainer.hosts} hosts"
    warning = cross_host_parallelism_warning(config)
    return Check("trainer layout", True, detail + (f"; warning: {warning}" if warning else ""))


def _engine_layout(config: Config, model: ModelFolder) -> Check:
    """SGLang cuts the KV heads, or gives several ranks a copy of the same one."""
    size = config.sglang.get("tp_size", 1)
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    fitting = [n for n in _common_divisors(heads) if kv_heads % n == 0 or n % kv_heads == 0]
    if size not in fitting:
        rule = f"must divide the model's {heads} attention heads, and divide or be a multiple of its {kv_heads} KV heads"
        remedy = f"set sglang.tp_size to one of {', '.join(map(str, fitting))}"
        return Check("engine layout", False, f"sglang.tp_size = {size!r}: {rule}", remedy)
    return Check("engine layout", True, f"{config.rollout.servers} servers, tensor {size} each")


def _context(config: Config, model: ModelFolder) -> Check:
    tokens, limit = config.model.context_tokens, model.max_position_embeddings
    if limit is not None and tokens > limit and not model.scales_rope:
        detail = f"model.context_tokens = {tokens} is more than the model's max_position_embeddings = {limit}"
        return Check("context", False, detail, f"set model.context_tokens to at most {limit}")
    return Check("context", True, f"{tokens} tokens" + ("" if limit is None else f" of {limit}"))


def _dataset(key: str, path: str, config: Config) -> Check:
    """Rows are numbered from 1, as editors number lines."""
    name, function = key.replace("data.", "dataset "), config.reward.function
    judged_by = (
        '"tests": [{"input": "1 1", "output": "2"}]' if function == "code" else '"answer": "2"'
    )
    form = f'a row is one line like {{"prompt": "1+1=", {judged_by}}}'
    num_rows = 0
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                wrong = _row_problem(line, function)
                if wrong:
                    return Check(
                        name,
                        False,
                        f"{key} = {path}, row {number}: {wrong}",
                        f"correct that row: {form}",
                    )
                num_rows += 1
    except OSError as e:
        return Check(
            name,
            False,
            f"{key} = {path} cannot be read: {e.strerror}",
            f"set {key} to a JSONL file; {form}",
        )
    if not num_rows:
        return Check(
            name, False, f"{key} = {path} has no rows", f"set {key} to another JSONL file; {form}"
        )
    return Check(name, True, f"{path}: {num_rows:,} rows")


def _row_problem(line: bytes, reward_function: str) -> str | None:
    try:
        row = msgspec.json.decode(line)
    except msgspec.DecodeError as e:
        return f"not JSON: {e}"
    if not isinstance(row, dict):
        return "not a JSON object"
    if not isinstance(row.get("prompt"), (str, list)) or not row["prompt"]:
        return "no `prompt`"
    if reward_function == "math" and row.get("answer") in (None, ""):
        return "no `answer`, which reward.function = math compares with"
    if reward_function == "code":
        try:
            read_tests(row)
        except DataError as e:
            return str(e)
    return None


def _sandbox(config: Config) -> Check:
    settings = config.sandbox
    try:
        with Sandbox(SandboxSettings(settings.python, settings.isolation)) as sandbox:
            layers = ("namespaces, " if sandbox.has_namespaces else "") + "limits, Landlock, seccomp"
    except SandboxError as e:
        detail = (
            f"sandbox.python = {settings.python}, sandbox.isolation = {settings.isolation}: {e}"
        )
        remedy = (
            "use a host that allows user namespaces, or set sandbox.isolation=landlock (Landlock and seccomp alone)"
            if "namespaces" in str(e)
            else "set sandbox.python to a Python of 3.9 or newer; programs run on Linux 5.13 or newer, on x86-64"
        )
        return Check("sandbox", False, detail, remedy)
    return Check("sandbox", True, f"programs run in {settings.python}, behind {layers}")


def _controller_host(config: Config) -> Check:
    host = config.run.host
    try:
        socket.create_server((host, 0)).close()
    except OSError as e:
        remedy = "set run.host to an address of this host (ip addr shows them), or to 127.0.0.1 for a run on this host alone"
        return Check(
            "controller host", False, f"run.host = {host!r} is no address of this host: {e}", remedy
        )
    return Check("controller host", True, host)


def _engine_port(config: Config) -> Check:
    port = config.sglang.get("port")
    if port is None:
        return Check("engine port", True, "any free port")
    remedy = "take sglang.port out, and a free port is found for each server"
    host = config.sglang.get("host", "127.0.0.1")
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError, TypeError) as e:
        return Check(
            "engine port", False, f"sglang.port = {port!r} cannot be bound on {host}: {e}", remedy
        )
    return Check("engine port", True, f"{port} is free on {host}")


def _common_divisors(*numbers: int) -> list[int]:
    return [
        n for n in range(1, max(numbers) + 1) if all(number % n == 0 for number in numbers)
    ] or [1]


def size_text(size_bytes: int) -> str:
    return (
        f"{size_bytes / GIB:,.1f} GiB"
        if size_bytes >= GIB
        else f"{size_bytes / (1 << 20):,.1f} MiB"
    )


SETUP = "bash tools/setup_env.sh"


SGLANG_VERSIONS = ">=0.5.16,<=0.5.23"


def preflight(config: Config) -> None:
    """Raises ConfigError or DataError if the run cannot work: all that is wrong, each with its remedy."""
    engine = _engine()
    wrong = [] if engine.ok else [(engine, ConfigError)]
    wrong += [(check, error) for check, error in config_checks(config) if not check.ok]
    if wrong:
        texts = [f"{check.detail}; {check.remedy}" for check, _ in wrong]
        raise wrong[0][1](
            texts[0] if len(texts) == 1 else "\n  - ".join([f"{len(texts)} problems", *texts])
        )


def _engine() -> Check:
    python = engine_python()
    if python is None:
        return Check(
            "engine",
            False,
            "no Python environment with SGLang found",
            f"{SETUP}, or set {ENGINE_VARIABLE}",
        )
    wrong = f"set {ENGINE_VARIABLE} to the Python of an environment with SGLang, or unset it and {SETUP}"
    command = [
        str(python),
        "-I",
        "-c",
        "import importlib.metadata as m; print(m.version('sglang'))",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        return Check("engine", False, f"{python} does not run: {e}", wrong)
    version = answer.stdout.strip()
    if answer.returncode:
        last = answer.stderr.strip().splitlines()[-1:] or ["no output"]
        return Check("engine", False, f"{python} has no SGLang: {last[0]}", wrong)
    if not SpecifierSet(SGLANG_VERSIONS).contains(version, prereleases=True):
        return Check(
            "engine", False, f"{python} has SGLang {version}, supported is {SGLANG_VERSIONS}", wrong
        )
    return Check("engine", True, f"SGLang {version} ({python})")
