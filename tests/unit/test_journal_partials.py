"""The journal holds the tokens of an interrupted sample once, however often it is saved."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from megatron_async_rl.controller.journal import journal as journal_module
from megatron_async_rl.controller.journal.events import GroupDropped, JournalEvent, PartialSaved
from megatron_async_rl.controller.journal.journal import ARRAYS_FOLDER, Journal, read_events
from megatron_async_rl.protocol.types import Partial

STEP = 4000  # tokens between two updates


def saved(num_steps: int, index: int = 0, first_id: int = 0) -> PartialSaved:
    ids = np.random.default_rng(first_id).permutation(10 * STEP)[: num_steps * STEP].astype("<i4")
    experts = np.repeat(ids, 4).astype(np.uint8)
    partial = Partial(ids, -np.sqrt(ids).astype("<f4"), ids // STEP, experts)
    return PartialSaved(3, index, partial)


def check(path: Path, events: list[JournalEvent]) -> None:
    found = list(read_events(path))
    assert [type(event) for event in found] == [type(event) for event in events]
    for event, expected in zip(found, events, strict=True):
        if isinstance(event, PartialSaved) and isinstance(expected, PartialSaved):
            assert (event.group_id, event.index) == (expected.group_id, expected.index)
            for name in ("ids", "logprobs", "versions", "experts"):
                assert np.array_equal(getattr(event.partial, name), getattr(expected.partial, name))


def stored_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.with_name(ARRAYS_FOLDER).iterdir())


def test_repeated_interrupts_store_only_new_tokens(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    events = [saved(steps, index) for steps in range(1, 9) for index in (0, 1)]
    journal.append(events[:7])
    journal.flush().result(60)
    journal.append(events[7:])
    journal.close()
    check(path, events)
    assert stored_bytes(path) < 1.05 * 2 * 16 * 8 * STEP  # 16 bytes a token, of two samples


def test_sample_that_starts_over_is_stored_whole(tmp_path: Path) -> None:
    events = [saved(2), saved(1, first_id=1), saved(3), GroupDropped(3, "stale"), saved(4)]
    path = tmp_path / "journal.sqlite"
    for event in events:  # a new controller each time
        journal = Journal(path)
        journal.append([event])
        journal.close()
    check(path, events)


def test_failed_commit_does_not_shorten_what_was_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    path = tmp_path / "journal.sqlite"
    journal, failures = Journal(path), [2]
    sync = journal._arrays.sync

    def fail_twice() -> None:
        if failures[0]:
            failures[0] -= 1
            raise sqlite3.OperationalError("disk is full")
        sync()

    monkeypatch.setattr(journal._arrays, "sync", fail_twice)
    events = [saved(1), saved(2), saved(3)]
    journal.append(events)
    journal.close()
    monkeypatch.undo()
    if failures[0]:  # closed before the third attempt
        events = []
    check(path, events)
