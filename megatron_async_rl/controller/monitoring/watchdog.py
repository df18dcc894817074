"""Ends a stalled run (run.no_progress_timeout_s); reports which process waits for which."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter

from megatron_async_rl import processes
from megatron_async_rl.controller.context import Context
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.workers import Workers
from megatron_async_rl.errors import Error


def check(context: Context, awaited_since: float | None) -> None:
    """Raises Error if nothing was generated or trained for run.no_progress_timeout_s.

    `awaited_since`: when the trainer requested the batch that it waits for, if it does.
    """
    progress, limit_s = context.progress, context.config.run.no_progress_timeout_s
    silent_s = time.monotonic() - progress.last_progress
    if not progress.training or silent_s <= limit_s:
        return
    dump_stacks(context.workers)
    waits = who_waits(context.core, context.workers, awaited_since, context.journal.error)
    raise Error(
        f"nothing was generated or trained for {silent_s:.0f} s "
        f"(run.no_progress_timeout_s = {limit_s:.0f}): {waits}"
    )


def dump_stacks(workers: Workers) -> None:
    """Makes every process of this host, also a stopped one, write its stacks to its log."""
    for pid in [os.getpid(), *(worker.hello.pid for worker in workers)]:
        if processes.is_ours(pid):  # otherwise the pid is of another host
            with contextlib.suppress(OSError):  # it has ended
                os.kill(pid, signal.SIGUSR2)
                os.kill(pid, signal.SIGCONT)


def who_waits(core: Core, workers: Workers, awaited_since: float | None, journal_error: str) -> str:
    """Describes the stall: which process waits for which, and since when."""
    fleet, now = core.fleet, time.monotonic()
    states = Counter(group.state.value for group in core.state.groups.values())
    groups = ", ".join(f"{count} {state}" for state, count in states.items())
    trainer = "the controller waits for the trainer"
    if awaited_since is not None:
        waited_s = now - awaited_since
        trainer = (
            f"the trainer has waited for the batch of version {core.version} for {waited_s:.0f} s"
        )
    if journal_error:
        trainer += f"; the journal cannot be written ({journal_error}): free space in run.dir"
    described = [
        f"{w.name} {w.state.value} at version {w.version} with {w.load} samples, last heard "
        f"{now - w.last_heard:.0f} s ago"
        for w in fleet.rollout.values()
    ]
    described += [
        f"{w.name} with {w.load} score requests, last heard {now - w.last_heard:.0f} s ago"
        for w in fleet.reward.values()
    ]
    described += [
        f"{w.name} lost"
        for w in workers
        if w.hello.role != "trainer" and w.name not in {*fleet.rollout, *fleet.reward}
    ]
    return (
        f"{trainer}; groups: {groups or 'none'}; {'; '.join(described)}; the next group would be "
        f"trained at step {core.leases.next_step}"
    )
