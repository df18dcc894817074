"""Scores responses in a pool of processes that can be killed; used by __main__.py.

A failed scoring attempt is reward None with an error, never a reward of 0: an exception, a result
that is not a finite number, a dead scoring process, a lost sandbox. Deadlines differ by function:

    math      reward 0 with error "timeout": the response caused it (9^{9^{9^{9}}} + 1)
    code      the sandbox limits the program itself (reward 0); a scoring process that exceeds
              that limit by CODE_MARGIN_S is an infrastructure error
    custom    an infrastructure error: the function may be waiting for a server
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext
from typing import Any

from pebble import ProcessExpired, ProcessPool

from megatron_async_rl.config.sections import RewardConfig, SandboxConfig
from megatron_async_rl.data import thinking
from megatron_async_rl.data.code_tests import read_tests
from megatron_async_rl.errors import ConfigError, DataError, Error
from megatron_async_rl.protocol.messages import MAX_ANSWER, ScoreRequest, ScoreResult
from megatron_async_rl.protocol.user_metrics import MetricFilter
from megatron_async_rl.reward import math_answer, scoring_process
from megatron_async_rl.reward.scoring_process import Outcome
from megatron_async_rl.sandbox.sandbox import Limits

START_TIMEOUT_S = 60.0  # for a scoring process to start and to import the reward function
MAX_TASKS = 500  # then a scoring process is replaced: sympy's caches only grow
CODE_MARGIN_S = 10.0  # past reward.timeout_s, which the sandbox enforces: time to restart it
PREFETCH = 2  # tasks in the pool per scoring process, so that none idles between two
_KILL_S = 10.0  # upper bound of the time to kill and replace a scoring process

log = logging.getLogger(__name__)


class RewardWorker:
    """Scores responses with one reward function.

        worker = RewardWorker(config.reward, config.sandbox)
        await worker.start()  # ConfigError if reward.function cannot be loaded
        result = worker.score_inline(request) or await worker.score(request)
        worker.stop()

    At most `slots` tasks may await `score` at once, or the deadlines of some include a wait.
    """

    def __init__(self, config: RewardConfig, sandbox: SandboxConfig) -> None:
        self._config = config
        self._sandbox = sandbox
        self._function = config.function
        self._thinking_tags = config.thinking_tags
        self.slots = config.processes_per_worker * PREFETCH
        self._metrics = MetricFilter(log)
        self._pool: ProcessPool | None = None
        self.num_pools = 0  # started so far; more than one means that a pool broke

    async def start(self) -> None:
        """Loads a custom function, or starts the sandbox, in a scoring process.

        Raises ConfigError if that fails. `math` starts no process yet.
        """
        if self._function == "math":
            return
        setting = f"reward.function = {self._function!r}"
        try:
            error = await self._run(scoring_process.load_error, (), START_TIMEOUT_S)
        except TimeoutError:
            error = f"{setting} was not loaded within {START_TIMEOUT_S:.0f} s"
        except (BrokenProcessPool, ProcessExpired) as e:
            error = f"{setting} cannot be loaded: the process that loaded it died ({e})"
        if error and self._function == "code":
            raise ConfigError(
                "reward.function = code cannot confine programs on this host with sandbox.python = "
                f"{self._sandbox.python}, sandbox.isolation = {self._sandbox.isolation}: {error}"
            )
        if error:
            raise ConfigError(error)

    def score_inline(self, request: ScoreRequest) -> ScoreResult | None:
        """Returns the result in microseconds if no scoring process is needed, else None."""
        if self._function != "math":
            return None
        started = time.perf_counter()
        try:
            answers = self._answers(request)
            is_right = math_answer.compare_plain(*answers)
        except Exception as e:  # of the row; any other failure must not end the worker either
            return _result(request, Outcome(None, f"{type(e).__name__}: {e}"), started)
        if is_right is None:
            return None
        return _result(request, Outcome(float(is_right)), started, answers[1])

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Scores in a scoring process. Failures are in the result, unless none can be started."""
        started = time.perf_counter()
        timeout_s = self._config.timeout_s + (CODE_MARGIN_S if self._function == "code" else 0.0)
        answer = ""
        try:
            task, arguments = self._task(request)
            answer = arguments[1] if self._function == "math" else ""
            outcome = await self._run(task, arguments, timeout_s)
            outcome = outcome._replace(metrics=self._metrics.valid(outcome.metrics))
        except DataError as e:
            outcome = Outcome(None, f"DataError: {e}")
        except TimeoutError:  # the pool killed the scoring process
            taken_s = time.perf_counter() - started
            if taken_s < timeout_s:  # the pool uses the wall clock
                killed = f"killed after {taken_s:.1f} s of {timeout_s:g} s"
                outcome = Outcome(None, f"{killed}: this host's clock was changed")
            elif self._function == "math":
                outcome = Outcome(0.0, "timeout")
            else:
                outcome = Outcome(None, f"not scored within {timeout_s:g} s")
        except (ProcessExpired, BrokenProcessPool, _PoolStuck) as e:
            outcome = Outcome(None, f"the scoring process died: {e}")
        return _result(request, outcome, started, answer)

    def _task(self, request: ScoreRequest) -> tuple[Callable[..., Outcome], tuple[Any, ...]]:
        """Returns a function and its arguments. Raises DataError if the row lacks a field."""
        row, response = request.row, request.response
        if self._function == "math":
            return scoring_process.score_math, self._answers(request)
        if self._function == "code":
            limits = Limits(self._sandbox.test_timeout_s, self._sandbox.memory_mb << 20)
            text = thinking.after_thinking(request.opening_tag + response, self._thinking_tags)
            return scoring_process.score_code, (
                text,
                read_tests(row),
                limits,
                self._config.timeout_s,
            )
        prompt = row.get("prompt", "")
        return scoring_process.score_custom, (prompt, response, row, request.text_ends)

    def _answers(self, request: ScoreRequest) -> tuple[str, str]:
        response = request.opening_tag + request.response
        return math_answer.read_answers(response, request.row, self._thinking_tags)

    def stop(self) -> None:
        """Kills the scoring processes; requests in progress get no result."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    async def _run(
        self, task: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float
    ) -> Any:
        """Runs a task in the pool; replaces a pool that broke or hangs.

        Raises Error if no scoring process can be started any more.
        """
        try:
            pool = self._pool or self._start_pool()
            future = pool.schedule(task, arguments, timeout=timeout_s)
        except RuntimeError:  # pebble raises it for a broken pool, e.g. if an idle process died
            self._drop(pool)
            pool = self._start_pool()
            future = pool.schedule(task, arguments, timeout=timeout_s)
        # up to PREFETCH - 1 tasks may run first in the same process, each to its deadline
        limit_s = START_TIMEOUT_S + PREFETCH * (timeout_s + _KILL_S)
        wrapped = asyncio.wrap_future(future)
        done, _ = await asyncio.wait([wrapped], timeout=limit_s)
        if not done:
            self._drop(pool)
            raise _PoolStuck(f"no result and no timeout from the pool within {limit_s:.0f} s")
        try:
            return wrapped.result()
        except BrokenProcessPool:
            self._drop(pool)
            raise

    def _start_pool(self) -> ProcessPool:
        # from a fork server, which has no threads: this process has (zmq), so it must not fork
        context = multiprocessing.get_context("forkserver")
        preload = ["megatron_async_rl.reward.fork_server", __name__]
        if self._function == "math":
            preload.append("math_verify")
        context.set_forkserver_preload(preload)
        if self.num_pools:
            _check_fork_server(context)
        self._pool = ProcessPool(
            max_workers=self._config.processes_per_worker,
            max_tasks=MAX_TASKS,
            initializer=scoring_process.initialize,
            initargs=(self._function, self._sandbox),
            context=context,
        )
        self.num_pools += 1
        return self._pool

    def _drop(self, pool: ProcessPool) -> None:
        if pool is self._pool:  # several tasks may find it broken; the first one drops it
            log.warning("the pool of scoring processes broke and is replaced")
            self.stop()


def _check_fork_server(context: ForkServerContext) -> None:
    """Raises Error if the fork server, whose socket is below TMPDIR, cannot be reached.

    The launcher then starts this worker again, with another fork server.
    """
    try:
        process = context.Process(target=int)
        process.start()
    except OSError as e:
        raise Error(
            f"no scoring process can be started: {e}", "keep other programs from cleaning TMPDIR"
        ) from None
    process.join()


class _PoolStuck(Exception):
    """The pool returned neither a result nor a timeout."""


def _result(
    request: ScoreRequest, outcome: Outcome, started: float, answer: str = ""
) -> ScoreResult:
    return ScoreResult(
        request.key,
        outcome.reward,
        outcome.error,
        time.perf_counter() - started,
        request.call,
        answer[:MAX_ANSWER],
        outcome.metrics,
        outcome.turn_rewards,
    )
