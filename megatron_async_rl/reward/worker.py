"""Runs a reward function on answers, in children that can be killed; called by the reward process (__main__.py).

A verdict is a number. What went wrong in the judge is `reward=None` with an error, never a 0: an exception, a result
that is no finite number, a dead child, a sandbox that is lost. The deadline is the one thing that differs. Where the
built-in `math` does not end in time the answer itself made it so (9^{9^{9^{9}}} in a box): that is a verdict, 0 with
error "timeout". So is a program that does not end, and the sandbox of `code` sees to that by itself: a child that is late
with its verdict is broken. Where a function of the user's own does not end in time, it may wait for a server: that is an
infrastructure error too.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import math
import multiprocessing
import numbers
import re
import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pebble import ProcessExpired, ProcessPool

from megatron_async_rl import processes
from megatron_async_rl.config.sections import RewardConfig, SandboxConfig
from megatron_async_rl.data.code_tests import CodeTests, read_tests
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.protocol.messages import Score, Scored
from megatron_async_rl.reward import code_answer, math_answer
from megatron_async_rl.sandbox.box import Box, BoxError, BoxLost, BoxSettings, Limits

START_TIMEOUT_S = 60.0  # a child has this long to start and import what the reward function needs
MAX_TASKS = 500  # then a child is replaced: sympy's caches only grow
MATH_MEMORY_BYTES = 4 << 30  # address space of a child that runs the built-in `math`
CODE_MARGIN_S = (
    10.0  # past reward.timeout_s: the sandbox has its own clock, and may have to be started anew
)
PREFETCH = 2  # tasks in the pool per child, so that none waits for our event loop between two
_KILL_S = 10.0  # killing and replacing a child takes less
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

log = logging.getLogger(__name__)

Verdict = tuple[float | None, str]  # reward, error


class RewardWorker:
    """Scores answers with one reward function.

        worker = RewardWorker(config.reward, config.sandbox)
        await worker.start()  # ConfigError where reward.function cannot be loaded
        scored = worker.score_at_once(message) or await worker.score(message)
        worker.stop()

    `score` may be awaited by `slots` tasks at once; more of them only wait longer than their deadline allows for.
    """

    def __init__(self, config: RewardConfig, sandbox: SandboxConfig) -> None:
        self._config = config
        self._sandbox = sandbox
        self._function = config.function
        if self._function not in ("math", "code") and not _FUNCTION.fullmatch(self._function):
            raise ConfigError(
                f"reward.function = {self._function!r}: expected `math`, `code` or package.module:function; name a "
                "function (prompt, response, row) -> float"
            )
        self.slots = config.processes_per_worker * PREFETCH
        self._pool: ProcessPool | None = None
        self.num_pools = 0  # started so far; more than one means that a pool broke and was replaced

    async def start(self) -> None:
        """Loads a custom function, or starts the sandbox, in a child, to fail now and not at the first answer.

        `math` starts no child yet.
        """
        if self._function == "math":
            return
        try:
            error = await self._run(_load_error, (), START_TIMEOUT_S)
        except (TimeoutError, FutureTimeout):
            error = f"not loaded within {START_TIMEOUT_S:.0f} s"
        except (BrokenProcessPool, ProcessExpired) as e:
            error = f"the process that loaded it died ({e})"
        if error and self._function == "code":
            raise ConfigError(
                f"reward.function = code cannot confine programs on this host with sandbox.python = "
                f"{self._sandbox.python}, sandbox.isolation = {self._sandbox.isolation}: {error}"
            )
        if error:
            raise ConfigError(
                f"reward.function = {self._function!r} cannot be loaded: {error}; name an importable "
                "package.module:function (the working directory is on the path)"
            )

    def score_at_once(self, message: Score) -> Scored | None:
        """The answer to the messages that need no child, in microseconds; None for the others."""
        if self._function != "math":
            return None
        started = time.perf_counter()
        try:
            verdict = math_answer.compare_plain(*math_answer.read(message.response, message.row))
        except DataError as e:
            return _scored(message, None, f"DataError: {e}", started)
        return None if verdict is None else _scored(message, float(verdict), "", started)

    async def score(self, message: Score) -> Scored:
        """The answer to any message, from a child. Never raises for what the answer or the function did."""
        started = time.perf_counter()
        timeout_s = self._config.timeout_s + (CODE_MARGIN_S if self._function == "code" else 0.0)
        try:
            function, arguments = self._task(message)
        except DataError as e:
            return _scored(message, None, f"DataError: {e}", started)
        try:
            reward, error = await self._run(function, arguments, timeout_s)
        except FutureTimeout:  # the pool's, which killed the child
            is_verdict = self._function == "math"
            reward, error = (
                (0.0, "timeout") if is_verdict else (None, f"not judged within {timeout_s:g} s")
            )
            taken_s = time.perf_counter() - started
            if (
                taken_s < timeout_s
            ):  # the pool goes by the wall clock: it has jumped, and the answer had no time
                reward, error = (
                    None,
                    f"ended after {taken_s:.1f} s of {timeout_s:g} s: this host's clock was changed",
                )
        except (ProcessExpired, BrokenProcessPool, _PoolStuck) as e:
            reward, error = None, f"the judging process died: {e}"
        return _scored(message, reward, error, started)

    def _task(self, message: Score) -> tuple[Callable[..., Verdict], tuple[Any, ...]]:
        """What a child is to do. Raises DataError when the row cannot be judged."""
        row = message.row
        if self._function == "math":
            return _judge_math, math_answer.read(message.response, row)
        if self._function == "code":
            limits = Limits(self._sandbox.test_timeout_s, self._sandbox.memory_mb << 20)
            return _judge_code, (message.response, read_tests(row), limits, self._config.timeout_s)
        return _judge, (row.get("prompt", ""), message.response, row)

    def stop(self) -> None:
        """Kills the children; what was being judged is not answered."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    async def _run(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float
    ) -> Any:
        """Runs it in a child. A pool that broke, or that itself hangs, is replaced by a new one."""
        try:
            pool = self._pool or self._start_pool()
            future = pool.schedule(function, arguments, timeout=timeout_s)
        except RuntimeError:  # how pebble says that it broke: a child died while idle, say
            self._drop(pool)
            pool = self._start_pool()
            future = pool.schedule(function, arguments, timeout=timeout_s)
        # PREFETCH - 1 tasks may run before ours in the same child, each to its deadline
        backstop_s = START_TIMEOUT_S + PREFETCH * (timeout_s + _KILL_S)
        wrapped = asyncio.wrap_future(future)
        done, _ = await asyncio.wait([wrapped], timeout=backstop_s)
        if not done:
            self._drop(pool)
            raise _PoolStuck(f"no verdict and no timeout from the pool within {backstop_s:.0f} s")
        try:
            return wrapped.result()
        except BrokenProcessPool:
            self._drop(pool)
            raise

    def _start_pool(self) -> ProcessPool:
        # Children come from a fork server, which is a clean process: we have threads (zmq), so we must not fork.
        context = multiprocessing.get_context("forkserver")
        preload = ["megatron_async_rl.reward.fork_server", __name__]
        context.set_forkserver_preload(
            [*preload, "math_verify"] if self._function == "math" else preload
        )
        self._pool = ProcessPool(
            max_workers=self._config.processes_per_worker,
            max_tasks=MAX_TASKS,
            initializer=_initialize,
            initargs=(self._function, BoxSettings(self._sandbox.python, self._sandbox.isolation)),
            context=context,
        )
        self.num_pools += 1
        return self._pool

    def _drop(self, pool: ProcessPool) -> None:
        if pool is self._pool:  # several tasks may find it broken; the first one drops it
            log.warning("the pool of reward children broke and is replaced")
            self.stop()


class _PoolStuck(Exception):
    """The pool answered neither with a verdict nor with a timeout."""


def _scored(message: Score, reward: float | None, error: str, started: float) -> Scored:
    return Scored(
        epoch=message.epoch,
        group_id=message.group_id,
        attempt=message.attempt,
        index=message.index,
        reward=reward,
        error=error,
        seconds=time.perf_counter() - started,
        number=message.number,
    )


# ---- in the children

_function: Callable[[str, str, dict[str, Any]], Any] | None = None
_function_error = ""
_box: Box | None = None


def _initialize(function: str, sandbox: BoxSettings) -> None:
    """Once per child: its limits, then its reward function or its sandbox."""
    global _function, _function_error, _box
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # pebble's handler would wait for sympy to come back to Python
    processes.die_with_parent()  # with the fork server, that is, and it ends with us
    if function == "code":
        _box = Box(sandbox)
        try:
            _box.start()
        except BoxError as e:
            _function_error = str(e)
        return
    if function == "math":
        resource.setrlimit(resource.RLIMIT_AS, (MATH_MEMORY_BYTES, MATH_MEMORY_BYTES))
        math_answer.load_math_verify()
        return
    module, _, name = function.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), name)
    except Exception as e:  # whatever a user's module raises; reported by _load_error
        _function_error = f"{type(e).__name__}: {e}"
        return
    if callable(loaded):
        _function = loaded
    else:
        _function_error = f"{name} is a {type(loaded).__name__}, not a function"


def _load_error() -> str:
    return _function_error


def _judge_math(gold: str, answer: str) -> Verdict:
    try:
        return float(math_answer.compare_latex(gold, answer)), ""
    except Exception as e:  # a judge that fails is an error of ours, never a 0
        return None, f"{type(e).__name__}: {e}"


def _judge_code(response: str, tests: CodeTests, limits: Limits, timeout_s: float) -> Verdict:
    assert _box is not None
    try:
        passes, why = code_answer.judge(_box, response, tests, limits, timeout_s)
    except (BoxLost, BoxError) as e:
        return None, f"the sandbox: {e}"
    except Exception as e:  # as in _judge_math
        return None, f"{type(e).__name__}: {e}"
    return float(passes), why


def _judge(prompt: str, response: str, row: dict[str, Any]) -> Verdict:
    if _function is None:
        return None, _function_error
    try:
        value = _function(prompt, response, row)
    except (
        Exception,
        SystemExit,
    ) as e:  # as above; some exceptions cannot travel, so their text does
        return None, f"{type(e).__name__}: {e}"
    if not isinstance(value, numbers.Real):
        return None, f"the reward function returned a {type(value).__name__}, not a number"
    reward = float(value)
    if not math.isfinite(reward):
        return None, f"the reward function returned {reward}"
    return reward, ""
