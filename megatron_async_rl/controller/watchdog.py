"""The watchdog: when nothing moves for run.no_progress_timeout_s, who waits for whom, and every process's stacks in its log."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from pathlib import Path

from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.workers import Workers


def dump_stacks(workers: Workers) -> None:
    """Every process of this host writes the stacks of its threads into its log; one that is stopped is woken for it."""
    for pid in [os.getpid(), *(worker.hello.pid for worker in workers)]:
        with contextlib.suppress(OSError):  # it has ended
            if (
                b"megatron_async_rl" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ):  # else a worker's of another host
                os.kill(pid, signal.SIGUSR2)
                os.kill(pid, signal.SIGCONT)


def who_waits(
    core: Core, workers: Workers, awaited_since: float | None, journal_error: str, now: float
) -> str:
    """`awaited_since`: when the trainer asked for the batch that it has not got."""
    fleet = core.fleet
    groups = ", ".join(
        f"{n} {state}" for state, n in Counter(g.state.value for g in core.groups.values()).items()
    )
    trainer = (
        "the controller waits for the trainer"
        if awaited_since is None
        else f"the trainer has waited for the batch of version {core.version} for {now - awaited_since:.0f} s"
    )
    if journal_error:
        trainer += (
            f"; the journal cannot be written ({journal_error}): make room on the disk of run.dir"
        )
    said = [
        f"{w.name} {w.state.value} at version {w.version} with {w.load} samples, heard of {now - w.last_heard:.0f} s ago"
        for w in fleet.rollout.values()
    ]
    said += [
        f"{w.name} with {w.load} verdicts, heard of {now - w.last_heard:.0f} s ago"
        for w in fleet.reward.values()
    ]
    said += [
        f"{w.name} lost"
        for w in workers
        if w.hello.role != "trainer" and w.name not in fleet.rollout | fleet.reward
    ]
    return f"{trainer}; groups: {groups or 'none'}; {'; '.join(said)}; the next group would be of step {core.next_step}"
