"""The watchdog: when nothing moves for run.stall_s, who waits for whom, and every process's stacks in its log."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter

from megatron_async_rl.controller.core import Core
from megatron_async_rl.controller.workers import Workers


def dump_stacks(workers: Workers) -> None:
    """Every process of this host writes the stacks of its threads into its log."""
    for pid in [os.getpid(), *(worker.hello.pid for worker in workers)]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGUSR2)


def who_waits(core: Core, trainer_waits: bool, journal_error: str) -> str:
    groups = dict(Counter(group.state.value for group in core.groups.values()))
    trainer = "the trainer waits for a batch" if trainer_waits else "the controller waits for the trainer"
    if journal_error:
        trainer += f"; the journal cannot be written ({journal_error}): make room on the disk of run.dir"
    servers = ", ".join(f"{w.name} {w.state.value} with {w.load} samples" for w in core.fleet.rollout.values())
    return f"{trainer}; groups {groups}; {servers}; next group would be of step {core.next_step}"
