"""Tokens of half-finished samples survive: the controller is killed, then the whole job, while samples are half generated.

What the journal held of them at that instant is where they go on: the same tokens, with the logprobs and the versions
under which they were sampled, and more tokens after them. At temperature 1 no second sample would begin the same.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from descendants import Descendants
from whole_runs import make_run_inputs, start_run, wait_for_version

from megatron_async_rl.cli import audit
from megatron_async_rl.config import load
from megatron_async_rl.controller.core.events import (
    AnyEvent,
    BatchTrained,
    ControllerStarted,
    GroupDropped,
    LeaseGranted,
    PartialSaved,
    SampleReturned,
)
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, read_events
from megatron_async_rl.engine_env import engine_python
from megatron_async_rl.protocol.types import Partial

pytestmark = pytest.mark.skipif(
    engine_python() is None, reason="no engine environment: bash tools/setup_env.sh"
)
START_S = 240.0
ETA = 3
Key = tuple[int, int]  # group, index


def half_finished(facts: list[AnyEvent]) -> dict[Key, Partial]:
    """What the journal holds of samples that are not back."""
    found: dict[Key, Partial] = {}
    for fact in facts:
        if isinstance(fact, PartialSaved):
            found[fact.group_id, fact.index] = fact.partial
        elif isinstance(fact, SampleReturned):
            found.pop((fact.group_id, fact.index), None)
        elif isinstance(fact, GroupDropped):
            found = {key: partial for key, partial in found.items() if key[0] != fact.group_id}
    return found


def next_life(facts: list[AnyEvent], life: int) -> list[AnyEvent]:
    begins = [place for place, fact in enumerate(facts) if isinstance(fact, ControllerStarted)]
    return facts[begins[life] :] if len(begins) > life else []


def went_on(facts: list[AnyEvent], life: int, before: dict[Key, Partial]) -> int:
    """How many samples went on from their tokens; all that were fresh enough must have."""
    leased_at: dict[int, int] = {}  # group -> version of the trainer when it was leased again
    count = life_of_fact = version = 0
    for fact in facts:
        if isinstance(fact, BatchTrained):
            version = fact.version
        elif isinstance(fact, ControllerStarted):
            life_of_fact = fact.epoch - 1
        elif life_of_fact < life:
            continue
        elif isinstance(fact, LeaseGranted):
            leased_at.setdefault(fact.group_id, version)
        elif isinstance(fact, SampleReturned) and (
            partial := before.pop((fact.group_id, fact.index), None)
        ):
            if partial.oldest_version < leased_at[fact.group_id] - ETA:
                continue  # too old to be trained: sampled anew
            sample, length = fact.sample, len(partial.ids)
            assert sample.ids[:length].tolist() == partial.ids.tolist()
            assert sample.versions[:length].tolist() == partial.versions.tolist()
            np.testing.assert_array_equal(sample.logprobs[:length], partial.logprobs)
            assert (np.diff(sample.versions[partial.num_input :]) >= 0).all()
            count += 1
    return count


def journal(run_dir: Path) -> list[AnyEvent]:
    return list(read_events(run_dir / JOURNAL_FILE))


def wait_for_half_finished(run_dir: Path, life: int, at_least: int = 4) -> None:
    deadline = time.monotonic() + START_S
    while True:
        facts = journal(run_dir)
        if (
            any(isinstance(f, BatchTrained) for f in next_life(facts, life))
            and len(half_finished(facts)) >= at_least
        ):
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_until_back(run_dir: Path, life: int, keys: set[Key]) -> list[AnyEvent]:
    """Returns when those samples have all been returned in that life, or dropped."""
    deadline = time.monotonic() + START_S
    while True:
        facts = journal(run_dir)
        after = next_life(facts, life)
        back = {(f.group_id, f.index) for f in after if isinstance(f, SampleReturned)}
        dropped = {f.group_id for f in after if isinstance(f, GroupDropped)}
        if all(key in back or key[0] in dropped for key in keys):
            return facts
        assert time.monotonic() < deadline, (keys - back, [type(f).__name__ for f in after][-20:])
        time.sleep(0.2)


def test_partial_samples_resume_after_a_killed_controller_and_job(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    path = make_run_inputs(tmp_path).config(
        run_dir,
        run={"steps": 5000, "export_every": 0},
        data={"eval": None},
        rollout={"max_concurrent_samples": 8},
        faults={"restart_backoff_s": 0.1},
        megatron={"tensor_model_parallel_size": 1},
        checkpoint={
            "every": 0
        },  # nothing is forgotten; a new trainer does all recorded batches again
    )
    child = start_run(path)
    watch = Descendants(child.pid)
    try:
        wait_for_version(run_dir, 0)
        wait_for_half_finished(run_dir, life=0)
        controller = next(
            p
            for p in watch.look()
            if p.is_running() and "megatron_async_rl.controller" in p.cmdline()
        )
        controller.kill()
        controller_lost = half_finished(journal(run_dir))
        facts = wait_until_back(run_dir, 1, set(controller_lost))
        assert went_on(facts, 1, controller_lost) >= 1

        wait_for_half_finished(run_dir, life=1)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert watch.left() == []
        job_lost = half_finished(journal(run_dir))
        assert len(job_lost) >= 1

        child = start_run(path)
        facts = wait_until_back(run_dir, 2, set(job_lost))
        assert went_on(facts, 2, job_lost) >= 1
        child.send_signal(signal.SIGTERM)
        assert child.wait(90) == 75
        result = audit.audit(run_dir, load.load(run_dir / "config.yaml").staleness.max_staleness)
        assert result.breaches == [] and result.lost == result.duplicated == 0 and result.lives == 3
    finally:
        for process in (
            psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
        ):
            process.kill()
        child.kill()
        child.communicate()
