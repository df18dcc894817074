"""Checks before a run starts: that engine, model, datasets and host fit the configuration.

`run` calls `preflight`, which raises an error with all problems; `doctor` prints every Check. No
large package is imported here (checks/settings.py uses other processes). Rows of a dataset and
parallel layouts are checked by the code that the controller and the trainer use, so the messages
are the same.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

from megatron_async_rl import processes
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.datasets import SourceConfig
from megatron_async_rl.data import success_rate
from megatron_async_rl.data.dataset import check_source, evaluation_config
from megatron_async_rl.data.sources import training_sources
from megatron_async_rl.engine_env import ENGINE_VARIABLE, engine_python
from megatron_async_rl.errors import ConfigError, Error
from megatron_async_rl.hooks import custom_hooks
from megatron_async_rl.installed import Say
from megatron_async_rl.launcher import gpus, roles
from megatron_async_rl.launcher.checks.disk import check_disk, check_run_folder
from megatron_async_rl.launcher.checks.settings import (
    check_agent_command,
    check_hooks,
    check_megatron,
    check_sglang,
    check_weight_type,
)
from megatron_async_rl.launcher.checks.weights import check_model_files, check_model_weights
from megatron_async_rl.model import layout, memory
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.engine import engine_versions
from megatron_async_rl.model.layout import Layout
from megatron_async_rl.model.routing import replayed_routing
from megatron_async_rl.observability.loggers import check_installed
from megatron_async_rl.sandbox.sandbox import Sandbox, SandboxError

SETUP = "bash tools/setup_env.sh"
SGLANG_VERSIONS = ">=0.5.16,<=0.5.23"


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    detail: str  # the finding, or the problem
    remedy: str = ""  # if not ok: the setting to change or the command to type
    error: type[Error] = ConfigError  # raised by `preflight`


def preflight(config: Config, elsewhere: Collection[str] = (), say: Say = print) -> None:
    """Raises an error that lists all failed checks with remedies; its type is the first one's.

    `elsewhere`: processes that other hosts start. `say` shows a line before a check that takes
    seconds.
    """
    here = [name for name in roles.names(config) if name not in elsewhere]
    checks = [check_engine(config), *config_checks(config, say, here), check_gpus(config, here)]
    failed = [check for check in checks if not check.ok]
    if len(failed) == 1:
        raise failed[0].error(failed[0].detail, failed[0].remedy)
    if failed:
        problems = [str(check.error(check.detail, check.remedy)) for check in failed]
        raise failed[0].error("\n  - ".join([f"{len(failed)} problems", *problems]))


def config_checks(config: Config, say: Say, here: Collection[str] | None = None) -> Iterator[Check]:
    """Yields the checks of a configuration; those of the model end at the first that fails.

    `here`: the processes of this host; None: all.
    """
    here = roles.names(config) if here is None else here

    def check(name: str, function: Callable[[Config], str]) -> Check:
        try:
            return Check(name, True, function(config))
        except Error as e:
            return Check(name, False, e.problem, e.remedy, type(e))

    yield check("run.dir", check_run_folder)
    model = check("model", check_model_files)
    yield model
    is_known = False
    if model.ok:
        architecture = check("architecture", _architecture)
        yield architecture
        is_known = architecture.ok
        if is_known:
            if not config.model.random_init:
                yield check("model weights", check_model_weights)
            trainer = check("trainer layout", _trainer_layout)
            yield trainer
            yield check("engine layout", _engine_layout)
            if config.rollout.routing_replay:
                yield check("routing replay", _routing)
            yield check("context", _context)
            if config.has_trainer:
                yield check("weights type", check_weight_type)
            yield check("disk", check_disk)
            if trainer.ok and not config.on_cpu:
                yield check("GPU memory", lambda _: "; ".join(memory.summary(config)))
    yield check("dataset train", lambda _: _training_data(config, is_known))
    if config.evaluation.sets:
        yield check("dataset evaluation", lambda _: _evaluation_data(config, is_known))
    if config.data.filter.run:
        yield check("dataset filter", _success_rates)
    if config.reward.function == "code" or config.rollout.workflow == "python_tool":
        yield check("sandbox", _sandbox)
    if custom_hooks(config) or config.rollout.workflow_options:
        yield check("hooks", check_hooks)
    runs_agents = any(name.startswith("rollout-") for name in here)
    if config.rollout.agent_command is not None and runs_agents:
        yield check("agent", check_agent_command)
    yield check("megatron settings", lambda _: check_megatron(config, say))
    yield check("sglang settings", lambda _: check_sglang(config, say))
    yield check("loggers", check_installed)
    yield check("TMPDIR", lambda _: processes.temporary_parent())
    yield check("controller host", _controller_host)
    yield check("engine port", _engine_port)


def check_gpus(config: Config, names: Collection[str]) -> Check:
    """Checks that this host has the GPUs that these processes need."""
    if config.on_cpu:
        return Check("GPUs", True, "none needed (sglang.device = cpu)")
    visible = gpus.visible_gpus()
    try:
        assigned = gpus.assign_gpus(config, visible, names)
    except ConfigError as e:
        return Check("GPUs", False, e.problem, e.remedy)
    needed = sum(len(ids.split(",")) for ids in assigned.values() if ids)
    return Check("GPUs", True, f"{needed} of {len(visible)} used")


def check_engine(config: Config | None) -> Check:
    """Checks that there is an environment with a supported SGLang, new enough for `config`."""
    python = engine_python()
    if python is None:
        remedy = f"{SETUP}, or set {ENGINE_VARIABLE}"
        return Check("engine", False, "no Python environment with SGLang found", remedy)
    remedy = (
        f"set {ENGINE_VARIABLE} to the Python of an environment with SGLang, or unset it and run "
        f"{SETUP}"
    )
    program = "import importlib.metadata as m; print(m.version('sglang'))"
    command = [str(python), "-I", "-c", program]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        return Check("engine", False, f"{python} does not run: {e}", remedy)
    version = answer.stdout.strip()
    if answer.returncode:
        last_line = (answer.stderr.strip().splitlines() or ["no output"])[-1]
        return Check("engine", False, f"{python} has no SGLang: {last_line}", remedy)
    if not SpecifierSet(SGLANG_VERSIONS).contains(version, prereleases=True):
        problem = f"{python} has SGLang {version}, supported is {SGLANG_VERSIONS}"
        return Check("engine", False, problem, remedy)
    try:
        if config:
            engine_versions.check(config, engine_versions.parsed(version))
    except ConfigError as e:
        return Check("engine", False, e.problem, e.remedy)
    return Check("engine", True, f"SGLang {version} ({python})")


def _architecture(config: Config) -> str:
    """Checks that the family table and, with a trainer, Megatron cover the model."""
    hf_config = HfConfig(config.model.path)
    shape = hf_config.shape()
    if config.has_trainer:
        hf_config.architecture()
    return f"{shape.family.architecture}, {shape.num_layers} layers"


def _trainer_layout(config: Config) -> str:
    sizes = Layout.from_config(config)
    shape = HfConfig(config.model.path).shape()
    layout.check_trainer(sizes, shape)
    found = f"{config.trainer_ranks} ranks: tensor {sizes.tp}, pipeline {sizes.pp}"
    layers = sizes.stage_layers(shape.num_layers)
    if len(set(layers)) > 1:
        found += f" (layers {', '.join(map(str, layers))})"
    found += f", expert {sizes.ep}"
    if len(config.trainer_names) > 1:
        found += f"; {config.ranks_per_host} on each of {config.trainer.hosts} hosts"
    return found


def _engine_layout(config: Config) -> str:
    layout.check_engine(Layout.from_config(config), HfConfig(config.model.path).shape())
    return f"{config.rollout.servers} servers, tensor {config.engine_tp} each"


def _routing(config: Config) -> str:
    routing = replayed_routing(config)
    assert routing
    return f"{routing.width * routing.dtype.itemsize} bytes per token"


def _context(config: Config) -> str:
    tokens, limit = config.model.context_tokens, HfConfig(config.model.path).max_positions
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"model.context_tokens = {tokens} is more than the model's max_position_embeddings = "
            f"{limit}",
            f"set model.context_tokens to at most {limit}",
        )
    return f"{tokens} tokens" + ("" if limit is None else f" of {limit}")


def _training_data(config: Config, tokenizes: bool) -> str:
    return "; ".join(
        _dataset(setting, source, config, tokenizes) for setting, source in training_sources(config)
    )


def _evaluation_data(config: Config, tokenizes: bool) -> str:
    return "; ".join(
        _dataset(
            f"evaluation.sets.{name}.path", chosen, evaluation_config(config, chosen), tokenizes
        )
        for name, chosen in config.evaluation.sets.items()
    )


def _dataset(setting: str, source: SourceConfig, config: Config, tokenizes: bool) -> str:
    """`tokenizes`: False if the model cannot be read, which is another check's problem."""
    left_out: list[str] = []
    count = check_source(source, setting, config, left_out.append, tokenizes)
    return "; ".join([f"{source.path}: {count:,} rows", *left_out])


def _success_rates(config: Config) -> str:
    return (
        f"{config.data.filter.run}: success rates of {len(success_rate.recorded(config)):,} prompts"
    )


def _sandbox(config: Config) -> str:
    settings = config.sandbox
    try:
        with Sandbox(settings.python, settings.isolation) as sandbox:
            layers = (
                "namespaces, " if sandbox.has_namespaces else ""
            ) + "limits, Landlock, seccomp"
    except SandboxError as e:
        remedy = (
            "set sandbox.python to a Python of 3.9 or newer; programs run on Linux 5.13 or newer, "
            "on x86-64"
        )
        if "namespaces" in str(e):
            remedy = (
                "use a host that allows user namespaces, or set sandbox.isolation=landlock "
                "(Landlock and seccomp alone)"
            )
        keys = f"sandbox.python = {settings.python}, sandbox.isolation = {settings.isolation}"
        raise ConfigError(f"{keys}: {e}", remedy) from None
    return f"programs run in {settings.python}, behind {layers}"


def _controller_host(config: Config) -> str:
    host = config.run.host
    try:
        socket.create_server((host, 0)).close()
    except OSError as e:
        raise ConfigError(
            f"run.host = {host!r} is not an address of this host: {e}",
            "set run.host to an address of this host (ip addr shows them), or to 127.0.0.1 for a "
            "run on this host alone",
        ) from None
    return host


def _engine_port(config: Config) -> str:
    port, host = config.sglang.get("port"), config.sglang.get("host", "127.0.0.1")
    if port is None:
        return "any free port"
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError, TypeError) as e:
        raise ConfigError(
            f"sglang.port = {port!r} cannot be bound on {host}: {e}",
            "remove sglang.port: each server then takes a free port",
        ) from None
    return f"{port} is free on {host}"
