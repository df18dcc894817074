"""Runs in the scoring processes of a reward worker (worker.py): `initialize` once, then tasks.

A task returns (reward, error). A failure of the reward function or the sandbox is reward None with
an error, never a reward of 0.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
import numbers
import resource
import signal
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megatron_async_rl import hooks, processes
from megatron_async_rl.config.sections import SandboxConfig
from megatron_async_rl.data.code_tests import CodeTests
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.observability.error_log import user_error
from megatron_async_rl.protocol.types import turn_texts
from megatron_async_rl.reward import code_answer, math_answer
from megatron_async_rl.sandbox.sandbox import (
    Limits,
    Sandbox,
    SandboxError,
    SandboxLost,
)

MATH_MEMORY_BYTES = 4 << 30  # address space of a process that runs the built-in `math`


class Outcome(NamedTuple):
    """The result of one scoring attempt. `reward` is None if it failed."""

    reward: float | None
    error: str = ""
    metrics: dict[str, float] = {}  # noqa: RUF012
    turn_rewards: list[float] = []  # noqa: RUF012


_function: Callable[..., Any] | None = None
_load_error = ""
_sandbox: Sandbox | None = None
_runner = asyncio.Runner()  # one event loop for all calls: a client of the user's is bound to it


def initialize(function: str, sandbox: SandboxConfig) -> None:
    """Sets this process's limits and loads its reward function or starts its sandbox."""
    global _function, _load_error, _sandbox
    # pebble's handler would only run once sympy returns to the interpreter
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    processes.die_with_parent()  # the fork server, which dies with the reward worker
    if function == "code":
        _sandbox = Sandbox(sandbox.python, sandbox.isolation)
        try:
            _sandbox.start()
        except SandboxError as e:
            _load_error = str(e)
        return
    if function == "math":
        resource.setrlimit(resource.RLIMIT_AS, (MATH_MEMORY_BYTES, MATH_MEMORY_BYTES))
        math_answer.load_math_verify()
        return
    try:
        _function = hooks.load("reward.function", function)
    except ConfigError as e:
        _load_error = str(e)


def load_error() -> str:
    """Returns the reason why `initialize` failed, "" if it did not."""
    return _load_error


def score_math(expected: str, answer: str) -> Outcome:
    try:
        return Outcome(float(math_answer.compare_latex(expected, answer)))
    except Exception as e:  # any failure of math-verify is an infrastructure error
        return Outcome(None, f"{type(e).__name__}: {e}")


def score_code(response: str, tests: CodeTests, limits: Limits, timeout_s: float) -> Outcome:
    assert _sandbox is not None
    try:
        passes, reason = code_answer.passes_tests(_sandbox, response, tests, limits, timeout_s)
    except (SandboxLost, SandboxError) as e:
        return Outcome(None, f"the sandbox: {e}")
    except Exception as e:  # any failure of the comparison is an infrastructure error
        return Outcome(None, f"{type(e).__name__}: {e}")
    return Outcome(float(passes), reason)


def score_custom(prompt: str, response: str, row: dict[str, Any], text_ends: list[int]) -> Outcome:
    """Calls the user's function, which may be async and returns a number, or a list of one per
    turn, and with it perhaps a dict of metrics."""
    if _function is None:
        return Outcome(None, _load_error)
    optional = {}
    if hooks.takes(_function, "turns"):
        optional["turns"] = turn_texts(response, text_ends)
    try:
        result = _function(prompt, response, row, **optional)
        return _outcome(_runner.run(result) if inspect.iscoroutine(result) else result)
    # as text: some exceptions cannot be pickled, and CancelledError would end the worker's task
    except BaseException as e:
        return Outcome(None, user_error(e))


def _outcome(value: Any) -> Outcome:
    """Reads the result of a reward function; an object of the user's own may raise at any use."""
    metrics: Any = {}
    if isinstance(value, tuple) and len(value) == 2:
        value, metrics = value
    given = value if isinstance(value, list) else [value]
    if not all(_is_number(n) for n in given) or not isinstance(metrics, Mapping):
        found = type(value if metrics == {} else metrics).__name__
        wanted = "a number or a list of numbers, or one of these and a dict of metrics"
        return Outcome(None, f"the reward function returned a {found}, must be {wanted}")
    rewards = [_as_float(number) for number in given]
    for reward in (*rewards, sum(rewards)):
        if not math.isfinite(reward):
            return Outcome(None, f"the reward function returned {reward}")
    if not rewards:
        return Outcome(None, "the reward function returned an empty list")
    # plain and few, so that the result can be sent; the worker drops invalid metrics
    plain = {
        str(name)[:100]: _as_float(number) if _is_number(number) else math.nan
        for name, number in itertools.islice(metrics.items(), 100)
    }
    return Outcome(math.fsum(rewards), "", plain, rewards if isinstance(value, list) else [])


def _is_number(value: Any) -> bool:
    """Tells numbers from other values; arrays and tensors without dimensions are numbers too."""
    return isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()


def _as_float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:  # of an integer, such as the difference to a long answer
        return math.inf
