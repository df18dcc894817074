"""Settings that name a built-in or a user's `package.module:name`: one table and one loader.

Every process loads its hooks here, so that a hook that cannot be used gives the same error text
everywhere. A built-in name stands for a package.module:name of this package and is loaded in the
same way. docs/extending.md has the signatures with shapes and units.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_async_rl.errors import ConfigError, HookFailed
from megatron_async_rl.observability.error_log import user_error

_CUSTOM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Hook:
    """The functions or classes that a setting may name."""

    parameters: tuple[str, ...]
    """Parameters of the function, in order; of `run`, if the hook is a class."""
    built_in: Mapping[str, str] = field(default_factory=dict)
    """Name -> package.module:name; "" if the process that uses it has its own code for it."""
    is_class: bool = False
    """A class with the method `run`; the arguments of its constructor have defaults."""
    may_be_async: bool = False
    """The function's result is awaited if it is a coroutine."""
    optional: str = ""
    """One more parameter, which a function gets if it has one of this name."""

    @property
    def signature(self) -> str:
        parameters = f"({', '.join(self.parameters)})"
        return f"Class with a method run{parameters}" if self.is_class else f"function{parameters}"


_ADVANTAGES = "megatron_async_rl.controller.advantage"
_OBJECTIVES = "megatron_async_rl.trainer.algorithms.objectives"
_WORKFLOWS = "megatron_async_rl.rollout.workflows"

HOOKS = {
    "algorithm.advantage.estimator": Hook(
        ("rewards", "lengths", "config"),
        {
            name: f"{_ADVANTAGES}:{name}"
            for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp", "gae", "turn_grpo", "turn_gae")
        },
        optional="turns",
    ),
    "algorithm.loss.objective": Hook(
        ("inputs", "config"),
        {name: f"{_OBJECTIVES}:{name}" for name in ("decoupled_ppo", "ppo", "gspo", "cispo")},
    ),
    "algorithm.filters.function": Hook(("rewards", "lengths", "row", "config")),
    "reward.function": Hook(
        ("prompt", "response", "row"),
        {
            "math": "",
            "code": "",
            "reasoning_gym": "megatron_async_rl.reward.reasoning_gym_answer:score",
        },
        may_be_async=True,
        optional="turns",
    ),
    "rollout.workflow": Hook(
        ("prompt", "policy", "sampling"),
        {
            "single_turn": f"{_WORKFLOWS}.single_turn:SingleTurn",
            "multi_turn_math": f"{_WORKFLOWS}.multi_turn_math:MultiTurnMath",
            "python_tool": f"{_WORKFLOWS}.python_tool:PythonTool",
        },
        is_class=True,
    ),
    "rollout.agent": Hook(("row", "client"), may_be_async=True),
    "data.reader": Hook(
        ("path", "source"), {"reasoning_gym": "megatron_async_rl.data.reasoning_gym_rows:read"}
    ),
}


def is_custom(value: str | None) -> bool:
    """Returns whether a setting names a user's hook, not a built-in one."""
    return value is not None and ":" in value


def check_name(setting: str, value: str | None) -> None:
    """Raises ConfigError unless the value is a built-in name, package.module:name or None.

    Imports nothing.
    """
    if value is not None and value not in HOOKS[setting].built_in and not _CUSTOM.fullmatch(value):
        raise _cannot_load(setting, value, "it is neither a known name nor package.module:name")
    if value is not None and ".py:" in value:
        raise _cannot_load(setting, value, "it names a file, not a module: leave .py out")


def load(setting: str, value: str) -> Any:
    """Returns the function or class that the setting names, built-in or a user's.

    Raises ConfigError if it cannot be imported, cannot be called or has other parameters.
    """
    check_name(setting, value)
    hook = HOOKS[setting]
    module, _, name = hook.built_in.get(value, value).partition(":")
    _add_working_directory()
    try:
        loaded = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as e:  # a user's module may raise anything
        error = _cannot_load(setting, value, f"{type(e).__name__}: {e}{_place(e)}")
        missing = e.name if isinstance(e, ModuleNotFoundError) else None
        if missing and not f"{module}.".startswith(f"{missing}."):
            remedy = f"install {missing} for {sys.executable}, or put its folder on PYTHONPATH"
            raise ConfigError(error.problem, remedy) from e
        raise error from e
    if problem := _signature_problem(loaded, hook):
        raise _cannot_load(setting, value, problem)
    return loaded


def workflow(name: str, options: dict[str, Any]) -> Any:
    """Returns an instance of rollout.workflow = `name` with rollout.workflow_options = `options`.

    Raises ConfigError like `load`, and for options that the constructor does not take.
    """
    workflow_class = load("rollout.workflow", name)
    signature = inspect.signature(workflow_class)
    try:
        signature.bind(**options)
    except TypeError as e:
        raise ConfigError(
            f"rollout.workflow_options = {options}: {e}",
            f"the options of {name} are {', '.join(signature.parameters) or 'none'}",
        ) from None
    return workflow_class(**options)


def guarded(setting: str, value: str) -> Callable[..., Any]:
    """Returns the function that the setting names; a user's raises HookFailed if it raises.

    Raises ConfigError like `load`.
    """
    function = load(setting, value)
    if not is_custom(value):
        return function

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except (Exception, SystemExit) as e:
            raise HookFailed(f"{setting} = {value} failed: {user_error(e)}") from e

    return call


def source_file(setting: str, value: str) -> Path:
    """Returns the file of a user's hook without importing it (but the packages around it).

    Raises ConfigError if there is no such file.
    """
    check_name(setting, value)
    module = value.partition(":")[0]
    _add_working_directory()
    try:
        spec = importlib.util.find_spec(module)
    except (Exception, SystemExit) as e:  # the __init__.py of a user's package may raise anything
        raise _cannot_load(setting, value, f"{type(e).__name__}: {e}{_place(e)}") from e
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise _cannot_load(setting, value, f"No module named {module!r}")
    return Path(spec.origin)


def values(config: Any) -> dict[str, str | None]:
    """Returns setting -> value of all hooks in a configuration."""
    return {setting: config.value(setting) for setting in HOOKS}


def custom_hooks(config: Any) -> dict[str, str]:
    """Returns setting -> package.module:name of the user's hooks in a configuration."""
    return {
        setting: value for setting, value in values(config).items() if value and is_custom(value)
    }


def digests(config: Any) -> dict[str, str]:
    """Returns setting -> `package.module:name sha256:...` of the file of each user's hook.

    Files that the hook's file imports are not covered. Raises ConfigError if a file is missing.
    """
    found = {}
    for setting, value in custom_hooks(config).items():
        digest = hashlib.sha256(source_file(setting, value).read_bytes()).hexdigest()
        found[setting] = f"{value} sha256:{digest}"
    return found


def check_lines(setting: str, value: str, checks: Sequence[tuple[str, str]]) -> list[str]:
    """Returns a line for each problem among the checks (name, problem) of a hook, or a summary."""
    hook = f"{setting} = {value}"
    failed = [
        f"FAILED {hook}: {name}: {problem.removeprefix(f'{hook} ')}"
        for name, problem in checks
        if problem
    ]
    return failed or [f"{hook}: {len(checks)} checks passed"]


def _cannot_load(setting: str, value: str, problem: str) -> ConfigError:
    hook = HOOKS[setting]
    names = f"{', '.join(hook.built_in)}, or " if hook.built_in else ""
    return ConfigError(
        f"{setting} = {value!r} cannot be loaded: {' '.join(problem.split())}",
        f"name {names}an importable package.module:{hook.signature}; its folder must be on "
        f"PYTHONPATH, as the working directory {Path.cwd()} is",
    )


def _add_working_directory() -> None:
    """Puts it on the path where the program was not started by python -m, which does."""
    if not {"", str(Path.cwd())} & {*sys.path}:
        sys.path.append(str(Path.cwd()))


def _place(error: BaseException) -> str:
    """Returns the line of a user's file that raised the error, or "" if the import itself did."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and "importlib" not in frame.filename
    ][1:]  # the first frame is in this file
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _signature_problem(loaded: Any, hook: Hook) -> str:
    if not callable(loaded):
        return f"it is a {type(loaded).__name__}, not a {hook.signature}"
    function: Any = loaded
    if hook.is_class:
        if not isinstance(loaded, type):
            return f"it is a {type(loaded).__name__}, not a class"
        if not _accepts(loaded, 0):
            return "its constructor needs arguments"
        if not callable(function := getattr(loaded, "run", None)):
            return "it has no method `run`"
    elif inspect.iscoroutinefunction(loaded) and not hook.may_be_async:
        return "it is async, and nothing awaits its result: write a function without async"
    count = len(hook.parameters) + hook.is_class  # and `self`
    named = dict.fromkeys([hook.optional] if takes(function, hook.optional) else [])
    if not _accepts(function, count, **named):
        return f"its parameters {inspect.signature(function)} are not {hook.parameters}"
    names = tuple(inspect.signature(function).parameters)[hook.is_class : count]
    if names != hook.parameters and sorted(names) == sorted(hook.parameters):
        return f"its parameters {names} are in another order than {hook.parameters}"
    return ""


def takes(function: Callable[..., Any], parameter: str) -> bool:
    """Returns whether a function has this parameter, such as the optional one of its hook."""
    try:
        return parameter in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature, or no function
        return False


def _accepts(function: Callable[..., Any], count: int, **named: None) -> bool:
    """Returns whether a function accepts this many positional arguments, and the named ones."""
    try:
        inspect.signature(function).bind(*range(count), **named)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature: the call decides
        return True
    return True
