"""Partial samples survive: first the controller is killed, then the whole job.

Generation resumes from the tokens in the journal: the same tokens with the logprobs and versions
under which they were sampled, followed by more. At temperature 1 no other sample would begin with
the same tokens.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import psutil
from descendants import Descendants
from needs import needs_engine
from whole_runs import make_run_inputs, start_run, wait_for_version

from megatron_async_rl.cli import audit
from megatron_async_rl.config import load
from megatron_async_rl.controller.journal.events import (
    AnyEvent,
    BatchTrained,
    ControllerStarted,
    GroupDropped,
    LeaseGranted,
    PartialSaved,
    SampleReturned,
)
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, read_events
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import Partial

pytestmark = needs_engine
TIMEOUT_S = 240.0
MAX_STALENESS = 3
Key = tuple[int, int]  # group, index


def partial_samples(events: list[AnyEvent]) -> dict[Key, Partial]:
    """Returns the tokens in the journal of samples that have not been returned."""
    found: dict[Key, Partial] = {}
    for event in events:
        if isinstance(event, PartialSaved):
            found[event.group_id, event.index] = event.partial
        elif isinstance(event, SampleReturned):
            found.pop((event.group_id, event.index), None)
        elif isinstance(event, GroupDropped):
            found = {key: partial for key, partial in found.items() if key[0] != event.group_id}
    return found


def events_since(events: list[AnyEvent], start: int) -> list[AnyEvent]:
    starts = [place for place, event in enumerate(events) if isinstance(event, ControllerStarted)]
    return events[starts[start] :] if len(starts) > start else []


def count_resumed(events: list[AnyEvent], start: int, before: dict[Key, Partial]) -> int:
    """Returns how many samples resumed; every sample that was fresh enough must have."""
    leased_at: dict[int, int] = {}  # group -> trainer version at its new lease
    count = start_of_event = version = 0
    for event in events:
        if isinstance(event, BatchTrained):
            version = event.version
        elif isinstance(event, ControllerStarted):
            start_of_event = event.epoch - 1
        elif start_of_event < start:
            continue
        elif isinstance(event, LeaseGranted):
            leased_at.setdefault(event.group_id, version)
        elif isinstance(event, SampleReturned) and (
            partial := before.pop((event.group_id, event.index), None)
        ):
            if partial.oldest_version < leased_at[event.group_id] - MAX_STALENESS:
                continue  # too stale to be trained: sampled again
            sample, length = event.sample, len(partial.ids)
            assert sample.ids[:length].tolist() == partial.ids.tolist()
            assert sample.versions[:length].tolist() == partial.versions.tolist()
            np.testing.assert_array_equal(sample.logprobs[:length], partial.logprobs)
            assert (np.diff(sample.versions[partial.num_input :]) >= 0).all()
            count += 1
    return count


def journal(run_dir: Path) -> list[AnyEvent]:
    return list(read_events(run_dir / JOURNAL_FILE))


def controller_of(launcher: int) -> psutil.Process:
    for process in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "megatron_async_rl.controller" in process.cmdline():
                return process
    raise AssertionError("no controller")


def suspend_with_partial_samples(
    run_dir: Path, start: int, controller: psutil.Process, at_least: int = 4
) -> None:
    """Suspends the controller when the journal has so many partial samples, after a step."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        controller.suspend()
        with contextlib.suppress(sqlite3.OperationalError, DataError):  # in the middle of a write
            events = journal(run_dir)
            if (
                any(isinstance(f, BatchTrained) for f in events_since(events, start))
                and len(partial_samples(events)) >= at_least
            ):
                return
        controller.resume()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_until_returned(run_dir: Path, start: int, keys: set[Key]) -> list[AnyEvent]:
    """Waits until that controller start has returned or dropped all these samples."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        events = journal(run_dir)
        after = events_since(events, start)
        back = {(f.group_id, f.index) for f in after if isinstance(f, SampleReturned)}
        dropped = {f.group_id for f in after if isinstance(f, GroupDropped)}
        if all(key in back or key[0] in dropped for key in keys):
            return events
        assert time.monotonic() < deadline, (keys - back, [type(f).__name__ for f in after][-20:])
        time.sleep(0.2)


def test_partial_samples_resume_after_a_killed_controller_and_job(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    path = make_run_inputs(tmp_path).config(
        run_dir,
        run={"steps": 5000, "export_every": 0},
        evaluation={"sets": {}},
        rollout={"max_concurrent_samples": 8},
        faults={"restart_backoff_s": 0.1},
        megatron={"tensor_model_parallel_size": 1},
        checkpoint={"every": 0},  # a restarted trainer repeats all recorded batches
    )
    child = start_run(path)
    watch = Descendants(child.pid)
    try:
        wait_for_version(run_dir, 0, child=child)
        controller = controller_of(child.pid)
        suspend_with_partial_samples(run_dir, 0, controller)
        controller.kill()
        controller_lost = partial_samples(journal(run_dir))
        events = wait_until_returned(run_dir, 1, set(controller_lost))
        assert count_resumed(events, 1, controller_lost) >= 1

        suspend_with_partial_samples(run_dir, 1, controller_of(child.pid))
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert watch.left() == []
        job_lost = partial_samples(journal(run_dir))
        assert len(job_lost) >= 1

        child = start_run(path)
        events = wait_until_returned(run_dir, 2, set(job_lost))
        assert count_resumed(events, 2, job_lost) >= 1
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=45)  # without checkpoints it waits for no save of 48 s
        assert child.returncode == 75
        result = audit.audit(run_dir, load.load(run_dir / "config.yaml").staleness.max_staleness)
        assert result.breaches == [] and result.lost == result.duplicated == 0
        assert result.epochs == 3
    finally:
        for process in (
            psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
        ):
            process.kill()
        child.kill()
        child.communicate()
