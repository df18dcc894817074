"""Is everything here that a run needs? `checks` for a person to read, `preflight` for `run` before it starts anything.

One function per question; it answers with a Check: what was found and, where that will not do, the command or setting
that mends it. Nothing heavy is imported: versions come from the installed metadata, the engine's from its own Python.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_async_rl import config as configuration
from megatron_async_rl.config import Config
from megatron_async_rl.errors import ConfigError, DataError, Error

ENGINE_VARIABLE = "MEGATRON_ASYNC_RL_ENGINE_PYTHON"
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
PATCHES = Path(__file__).resolve().parent.parent / "patches"
SETUP = "bash tools/setup_env.sh"

CPU_VERSIONS = {"torch": "~=2.13.0", "megatron-core": "~=0.16.1"}
GPU_VERSIONS = {"torch": ">=2.11", "megatron-core": "~=0.19.2"}
VERSIONS = dict.fromkeys(("transformers", "tokenizers", "safetensors", "numpy", "msgspec", "tensorboard"), ">=0")
SGLANG_VERSIONS = ">=0.5.16,<=0.5.23"
PYTHON_VERSIONS = ">=3.11,<3.13"

GIB = 1 << 30
MIN_CORES, MIN_MEMORY_BYTES, MIN_DISK_BYTES = 2, 4 * GIB, GIB
MIN_SHM_BYTES = {"CPU": 64 << 20, "GPU": GIB}  # gloo wants little of /dev/shm, NCCL a lot


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


def checks(config: Config | None) -> list[Check]:
    """Everything there is to know about this host and, with a config, about the run."""
    gpus = _gpus()
    return [
        _python(),
        *(_distribution(name, versions) for name, versions in (GPU_VERSIONS if gpus else CPU_VERSIONS).items()),
        *(_distribution(name, versions) for name, versions in VERSIONS.items()),
        _pyzmq(),
        _curve(),
        _apex(),
        _engine(),
        _patches(),
        Check("devices", True, ", ".join(gpus) if gpus else "CPU (no nvidia-smi here)"),
        _cores(),
        _memory(),
        _shm("GPU" if gpus else "CPU"),
        _disk(config),
        _loopback(),
        *([] if config is None else (check for check, _ in _run_checks(config))),
    ]


def preflight(config: Config) -> None:
    """Raises ConfigError or DataError if the run cannot work: all that is wrong, each with its remedy."""
    engine = _engine()
    wrong = [] if engine.ok else [(engine, ConfigError)]
    wrong += [(check, error) for check, error in _run_checks(config) if not check.ok]
    if wrong:
        texts = [f"{check.detail}; {check.remedy}" for check, _ in wrong]
        raise wrong[0][1](texts[0] if len(texts) == 1 else "\n  - ".join([f"{len(texts)} problems", *texts]))


def run(config_path: str | os.PathLike[str] | None, console: Console | None = None) -> int:
    """Prints the checks; 1 when something is missing."""
    console = console or Console()
    config, results = None, []
    if config_path is not None:
        try:
            config = configuration.load(config_path)
        except Error as e:
            results = [Check("configuration", False, str(e), "correct the YAML")]
    results = [*checks(config), *results]
    table = Table("", "", "", box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for check in results:
        mark = "[green]ok[/]" if check.ok else "[bold red]no[/]"
        detail = check.detail if check.ok else f"{check.detail}\n-> {check.remedy}"
        table.add_row(mark, check.name, Text(detail))
    console.print(table)
    missing = [check.name for check in results if not check.ok]
    console.print(f"\n{len(missing)} to mend: {', '.join(missing)}" if missing else "\nall there", highlight=False)
    return 1 if missing else 0


def engine_python() -> Path | None:
    """The Python that has SGLang: what the environment variable names, else the newest complete environment."""
    named = os.environ.get(ENGINE_VARIABLE)
    if named:
        return Path(named).expanduser()
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = Path(os.environ.get("MEGATRON_ASYNC_RL_CACHE") or f"{cache_home}/megatron_async_rl").expanduser()
    complete = [mark for mark in cache.glob("engine-*/.complete") if (mark.parent / "bin" / "python").exists()]
    return max(complete, key=lambda mark: mark.stat().st_mtime).parent / "bin" / "python" if complete else None


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if not SpecifierSet(PYTHON_VERSIONS).contains(version):
        return Check("Python", False, f"{version}, supported is {PYTHON_VERSIONS}", SETUP)
    return Check("Python", True, version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _distribution(name: str, versions: str) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, False, "not installed", SETUP)
    if not SpecifierSet(versions).contains(version, prereleases=True):
        return Check(name, False, f"{version}, supported is {versions}", f"pip install '{name}{versions}', or {SETUP}")
    return Check(name, True, version)


def _pyzmq() -> Check:
    """On PyPI `zmq` is a shim; the package is `pyzmq`."""
    version, shim = _version("pyzmq"), _version("zmq")
    if version is None:
        found = "not installed; `zmq` is, but that is an empty shim" if shim else "not installed"
        return Check("pyzmq", False, found, "pip install pyzmq")
    return Check("pyzmq", True, version + (" (the empty shim `zmq` is installed too: no harm)" if shim else ""))


def _curve() -> Check:
    try:
        from megatron_async_rl.transport import has_curve
    except ImportError as e:
        return Check("CURVE", False, f"cannot tell: {e}", "pip install --force-reinstall pyzmq")
    if not has_curve():
        return Check(
            "CURVE", False, "this libzmq was built without it, and no socket of ours opens without", "pip install pyzmq"
        )
    return Check("CURVE", True, "libzmq authenticates and encrypts")


def _apex() -> Check:
    """On PyPI `apex` is a web toolkit of 2013; NVIDIA's has to be built from its repository."""
    try:
        metadata = importlib.metadata.metadata("apex")
    except importlib.metadata.PackageNotFoundError:
        return Check("apex", True, "not installed; not needed")
    if "nvidia" not in f"{metadata['Summary']} {metadata['Author']} {metadata['Description']}".lower():
        return Check("apex", False, f"{metadata['Version']} is not NVIDIA's Apex", "pip uninstall apex")
    return Check("apex", True, f"{metadata['Version']} of NVIDIA")


def _engine() -> Check:
    python = engine_python()
    if python is None:
        return Check("engine", False, "no Python environment with SGLang found", f"{SETUP}, or set {ENGINE_VARIABLE}")
    wrong = f"set {ENGINE_VARIABLE} to the Python of an environment with SGLang, or unset it and {SETUP}"
    command = [str(python), "-I", "-c", "import importlib.metadata as m; print(m.version('sglang'))"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        return Check("engine", False, f"{python} does not run: {e}", wrong)
    version = answer.stdout.strip()
    if answer.returncode:
        last = answer.stderr.strip().splitlines()[-1:] or ["no output"]
        return Check("engine", False, f"{python} has no SGLang: {last[0]}", wrong)
    if not SpecifierSet(SGLANG_VERSIONS).contains(version, prereleases=True):
        return Check("engine", False, f"{python} has SGLang {version}, supported is {SGLANG_VERSIONS}", wrong)
    return Check("engine", True, f"SGLang {version} ({python})")


def _patches() -> Check:
    if not PATCHES.is_dir():
        return Check("patches", False, f"{PATCHES} is missing", "work in a checkout: pip install -e .")
    return Check("patches", True, str(PATCHES))


def _gpus() -> list[str]:
    """Like `NVIDIA H100 80GB HBM3 (81559 MiB)`; none where nvidia-smi is missing or finds no device."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode:
        return []
    return ["{} ({})".format(*line.split(", ")) for line in answer.stdout.splitlines() if line.count(", ") == 1]


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores} for this process"
    return Check("cores", cores >= MIN_CORES, detail, f"give the job at least {MIN_CORES} cores")


def _memory() -> Check:
    """What the host has left, or what is left to this cgroup where that is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        free = free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no cgroup v2 here: the host's number stands
    remedy = f"the smallest run needs {_size(MIN_MEMORY_BYTES)}: give the job more memory"
    return Check("memory", free >= MIN_MEMORY_BYTES, f"{_size(free)} available", remedy)


def _shm(device: str) -> Check:
    needed = MIN_SHM_BYTES[device]
    if not Path("/dev/shm").is_dir():
        return Check("/dev/shm", False, "missing", "mount it; in a container: --shm-size=8g")
    free = shutil.disk_usage("/dev/shm").free
    return Check(
        "/dev/shm", free >= needed, f"{_size(free)} free", f"needs {_size(needed)}; in a container: --shm-size=8g"
    )


def _disk(config: Config | None) -> Check:
    """Room for the logs and for the model that the run writes at its end."""
    run_dir = Path.cwd() if config is None else config.run_dir.absolute()
    folder = next(parent for parent in (run_dir, *run_dir.parents) if parent.exists())
    needed = MIN_DISK_BYTES
    if config is not None:
        needed += sum(path.stat().st_size for path in Path(config.model.path).glob("*.safetensors"))
    key = "run.dir" if config else "this folder"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check(
            "disk", False, f"{key} = {run_dir}: {folder} cannot be written", "set run.dir to a folder of yours"
        )
    free = shutil.disk_usage(folder).free
    detail = f"{key} = {run_dir}: {_size(free)} free, {_size(needed)} needed"
    return Check("disk", free >= needed, detail, "make room, or set run.dir to another file system")


def _loopback() -> Check:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            pass
    except OSError as e:
        return Check(
            "loopback", False, f"no port of 127.0.0.1 can be used: {e}", "bring the interface up: ip link set lo up"
        )
    return Check("loopback", True, "ports of 127.0.0.1 can be used")


def _run_checks(config: Config) -> Iterator[tuple[Check, type[Error]]]:
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
        return Check("model", False, f"{key}: not a Hugging Face folder of a decoder: {e}", remedy), None
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return Check("model", True, f"{path}: {model.num_hidden_layers} layers, {_size(size)}"), model


def _architecture(config: Config, model: ModelFolder) -> Check:
    names = ", ".join(model.architectures) or "none"
    if not set(model.architectures) & set(ARCHITECTURES):
        detail = f"model.path = {config.model.path}: its architecture is {names}"
        return Check("architecture", False, detail, f"use a model of one of {', '.join(ARCHITECTURES)}")
    return Check("architecture", True, names)


def _trainer_layout(config: Config, model: ModelFolder) -> Check:
    for name, parts in (
        ("tensor_model", {"attention heads": model.num_attention_heads, "KV heads": model.num_kv_heads}),
        ("pipeline_model", {"layers": model.num_hidden_layers}),
        ("expert_model", {"experts": model.num_experts}),
    ):
        size = config.parallel_size(name)
        for what, count in parts.items():
            if size > 1 and (not count or count % size):
                detail = f"megatron.{name}_parallel_size = {size} does not divide the model's {count} {what}"
                fitting = ", ".join(map(str, _common_divisors(*parts.values())))
                return Check("trainer layout", False, detail, f"set megatron.{name}_parallel_size to one of {fitting}")
    sizes = {name: config.parallel_size(f"{name}_model") for name in ("tensor", "pipeline", "expert")}
    return Check(
        "trainer layout", True, f"{config.trainer_ranks} ranks: {', '.join(f'{k} {v}' for k, v in sizes.items())}"
    )


def _engine_layout(config: Config, model: ModelFolder) -> Check:
    """SGLang cuts the KV heads, or gives several ranks a copy of the same one."""
    size = config.sglang.get("tp_size", 1)
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    fitting = [n for n in _common_divisors(heads) if kv_heads % n == 0 or n % kv_heads == 0]
    if size not in fitting:
        rule = (
            f"must divide the model's {heads} attention heads, and divide or be a multiple of its {kv_heads} KV heads"
        )
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
    name, needs_answer = key.replace("data.", "dataset "), config.reward.function == "math"
    form = 'a row is one line like {"prompt": "1+1=", "answer": "2"}'
    num_rows = 0
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                wrong = _row_problem(line, needs_answer)
                if wrong:
                    return Check(name, False, f"{key} = {path}, row {number}: {wrong}", f"correct that row: {form}")
                num_rows += 1
    except OSError as e:
        return Check(name, False, f"{key} = {path} cannot be read: {e.strerror}", f"set {key} to a JSONL file; {form}")
    if not num_rows:
        return Check(name, False, f"{key} = {path} has no rows", f"set {key} to another JSONL file; {form}")
    return Check(name, True, f"{path}: {num_rows:,} rows")


def _row_problem(line: bytes, needs_answer: bool) -> str | None:
    try:
        row = msgspec.json.decode(line)
    except msgspec.DecodeError as e:
        return f"not JSON: {e}"
    if not isinstance(row, dict):
        return "not a JSON object"
    if not isinstance(row.get("prompt"), (str, list)) or not row["prompt"]:
        return "no `prompt`"
    if needs_answer and row.get("answer") in (None, ""):
        return "no `answer`, which reward.function = math compares with"
    return None


def _controller_host(config: Config) -> Check:
    host = config.run.host
    try:
        socket.create_server((host, 0)).close()
    except OSError as e:
        remedy = "set run.host to an address of this host (ip addr shows them), or to 127.0.0.1 for a run on this host alone"
        return Check("controller host", False, f"run.host = {host!r} is no address of this host: {e}", remedy)
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
        return Check("engine port", False, f"sglang.port = {port!r} cannot be bound on {host}: {e}", remedy)
    return Check("engine port", True, f"{port} is free on {host}")


def _common_divisors(*numbers: int) -> list[int]:
    return [n for n in range(1, max(numbers) + 1) if all(number % n == 0 for number in numbers)] or [1]


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:,.1f} GiB" if size_bytes >= GIB else f"{size_bytes / (1 << 20):,.1f} MiB"
