"""Checks `megatron:`, `sglang:` and the user's hooks as the processes of the run will find them.

Each runs in a short process of its own: of the trainer's or the engine's Python, or, because a
hook may do anything when it is imported, of one that has this launcher's module path.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from megatron_async_rl import hooks, installed, processes
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config import passed_on
from megatron_async_rl.config.config import Config
from megatron_async_rl.engine_env import engine_python
from megatron_async_rl.errors import ConfigError, Error
from megatron_async_rl.installed import Say
from megatron_async_rl.model.engine import engine_types

HOOK_TIMEOUT_S = 120.0
_LOAD_HOOKS = """
import json, sys
import msgspec
from megatron_async_rl import hooks
from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.controller import advantage
from megatron_async_rl.errors import ConfigError, HookFailed
custom, workflow, options, algorithm = json.loads(sys.argv[1])
calls = [(hooks.load, item) for item in custom.items() if item[0] != "rollout.workflow"]
problems = []
for function, arguments in [*calls, (hooks.workflow, (workflow, options))]:
    try:
        function(*arguments)
    except ConfigError as e:
        problems.append([e.problem, e.remedy])
try:
    if advantage.SETTING in custom and not problems:
        advantage.check_estimator(msgspec.convert(algorithm, AlgorithmConfig))
except HookFailed as e:
    found = [line.strip() for line in e.problem.splitlines()[:2]]
    trial = "(in a trial with made-up rewards of 0 and 1)"
    problems.append([" ".join([*found, trial]), e.remedy or "correct it"])
print()
print("problems:" + json.dumps(problems), flush=True)
"""


def check_megatron(config: Config, say: Say) -> str:
    """Raises ConfigError for a key under megatron: that the installed version refuses."""
    if not config.megatron:
        return "none set"
    try:
        known = installed.trainer_settings(say)
    except Error as e:
        return f"not checked: {e}"
    passed_on.check("megatron", config.megatron, known)
    return f"{len(config.megatron)} set, all known to {known.library}"


def check_megatron_together(config: Config, say: Say) -> str:
    """Raises ConfigError for keys under megatron: that Megatron-Core refuses together."""
    say("making Megatron-Core's configuration of the trainer (some seconds)")
    module = "megatron_async_rl.trainer.known_settings"
    env = os.environ | {"PYTHONPATH": processes.python_path()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(configuration.dump(config))
        command = [sys.executable, "-m", module, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode == 0:
        return "Megatron-Core accepts them together"
    last_line = (done.stderr.strip().splitlines() or ["no output"])[-1]
    if done.returncode != processes.EXIT_ERROR:
        return f"not checked: {last_line}"
    raise ConfigError(
        last_line.removeprefix("error: "), "change one of the settings that the message names"
    )


def check_sglang(config: Config, say: Say) -> str:
    """Raises ConfigError for a key under sglang: that the engine's version refuses."""
    python, replays = engine_python(), config.rollout.routing_replay
    if python is None or not (config.sglang or replays):
        return "none set" if python else "not checked: there is no engine"
    try:
        known = installed.engine_settings(python, say)
    except Error as e:
        return f"not checked: {e}"
    passed_on.check("sglang", config.sglang, known)
    if replays and "enable_return_routed_experts" not in known.settings:
        raise ConfigError(
            f"rollout.routing_replay = true, but {known.library} does not return the experts that "
            "it chose",
            "install a newer SGLang in the engine's environment, or remove rollout.routing_replay",
        )
    return f"{len(config.sglang)} set, all known to {known.library}"


def check_weight_type(config: Config) -> str:
    """Raises ConfigError if the servers store another element type than the trainer sends.

    The digests of trainer and engine would differ at every update.
    """
    types = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    sent: str = config.weights.dtype
    sent = types[config.trainer.precision] if sent == "as_trained" else sent
    stored = engine_types.weight_dtype(config)
    if stored not in (sent, ""):
        chosen = config.sglang.get("dtype", "auto")
        raise ConfigError(
            f"the servers store {stored} (sglang.dtype = {chosen}), but the trainer sends {sent} "
            f"(weights.dtype = {config.weights.dtype}, trainer.precision = "
            f"{config.trainer.precision})",
            f"set weights.dtype={stored}, or sglang.dtype={sent}",
        )
    engine_types.convolution_dtype(config)
    return sent


def check_agent_command(config: Config) -> str:
    """Raises ConfigError if the program of rollout.agent_command is not on this host."""
    command = config.rollout.agent_command or ""
    program = shlex.split(command)[0]
    if (found := shutil.which(program)) is None:
        raise ConfigError(
            f"rollout.agent_command = {command}: there is no program {program}",
            "install it, put its folder on PATH, or write its path",
        )
    return found


def check_hooks(config: Config) -> str:
    """Raises ConfigError for a user's function or class that cannot be imported and called.

    The estimator of advantages is called with a batch; objectives need the trainer (selftest).
    """
    custom, rollout = hooks.custom_hooks(config), config.rollout
    names = ", ".join(custom.values()) or rollout.workflow
    arguments = (custom, rollout.workflow, rollout.workflow_options, config.algorithm)
    command = [sys.executable, "-c", _LOAD_HOOKS, msgspec.json.encode(arguments).decode()]
    env = os.environ | {"PYTHONPATH": processes.python_path()}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=HOOK_TIMEOUT_S, check=False, env=env
        )
        # a module may print, too, when it is imported and when the process ends
        printed = done.stdout.rpartition("\nproblems:")[2].partition("\n")[0]
        problems = msgspec.json.decode(printed, type=list[tuple[str, str]])
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{names}: not imported, or the estimator not called, within {HOOK_TIMEOUT_S:.0f} s",
            "move what takes long out of the import of the module and out of the estimator",
        ) from None
    except msgspec.DecodeError:
        last_line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConfigError(
            f"{names}: the process that imported it ended: {last_line}",
            "correct the module; python -c 'import MODULE' shows more",
        ) from None
    if problems:
        *others, (problem, remedy) = problems
        before = [f"{problem}; {remedy.partition('; its folder')[0]}" for problem, remedy in others]
        raise ConfigError("; ".join([*before, problem]), remedy)
    return f"{names} can be imported"
