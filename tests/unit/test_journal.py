"""The journal, checkpoint folders and the audit: crashes, full disks and damaged files."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from core_builders import (
    join_workers,
    make_core,
    make_sample,
    restart_core,
)
from journal_builders import journal_events, write_checkpoint

from megatron_async_rl.cli import audit
from megatron_async_rl.controller.journal import journal as journal_module
from megatron_async_rl.controller.journal.events import (
    BatchSelected,
    ControllerStarted,
    GroupAdmitted,
    JournalEvent,
)
from megatron_async_rl.controller.journal.journal import Journal, read_events
from megatron_async_rl.controller.journal.reader import read_batch
from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.sample_log import (
    SAMPLES_FILE,
    TrainedGroup,
    encode_line,
    sample_line,
)
from megatron_async_rl.storage import checkpoints


def state(events: list[JournalEvent]) -> tuple:
    core = restart_core(make_core(max_staleness=1), events)
    groups = [
        (
            g.group_id,
            g.state,
            g.attempt,
            [s and s.versions.tolist() for s in g.samples],
            g.rewards,
            sorted(g.partials),
        )
        for g in core.state.groups.values()
    ]
    return core.version, core.state.ledger.table(core.state.pending), groups


def test_every_event_is_read_back_with_its_arrays(tmp_path: Path) -> None:
    events = journal_events()
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append(events)
    journal.flush().result(60)
    again = list(journal.events())
    journal.close()
    assert [type(fact) for fact in again] == [type(fact) for fact in events]
    assert state(again) == state(events)
    kinds = {type(fact).__name__ for fact in events}
    assert {
        "GroupAdmitted",
        "LeaseGranted",
        "SampleReturned",
        "SampleScored",
        "BatchSelected",
        "BatchTrained",
        "PartialSaved",
    } <= kinds


def test_every_prefix_of_the_journal_restores_a_valid_state() -> None:
    """Simulates a crash after every single event."""
    events = journal_events()
    for count in range(len(events) + 1):
        core = restart_core(make_core(max_staleness=1), events[:count])
        core.state.check()
        admitted = sum(isinstance(fact, GroupAdmitted) for fact in events[:count])
        assert core.state.ledger.admitted == admitted
        join_workers(core)
        core.state.check()
        prompts = [group.prompt.prompt_id for group in core.state.groups.values()]
        assert len(set(prompts)) == len(prompts)


def test_failure_of_the_writer_ends_the_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal.sqlite")

    def fail(*values: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(journal, "_row", fail)
    journal.append(journal_events())
    with pytest.raises(DataError, match="cannot be written: KeyError: 'a bug'"):
        journal.flush().result(60)
    with pytest.raises(DataError, match="cannot be written"):
        journal.append(journal_events())
    journal.close()


def test_cancelled_wait_does_not_end_the_writer(tmp_path: Path) -> None:
    """A trainer that joins again cancels an update, which may wait for the journal."""
    journal = Journal(tmp_path / "journal.sqlite")

    async def cancel_waits() -> None:
        for event in journal_events():
            journal.append([event])
            waiting = asyncio.create_task(journal.durable())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(cancel_waits())
    journal.flush().result(60)
    assert len(list(journal.events())) == len(journal_events())
    journal.close()


def test_process_killed_while_writing_leaves_a_prefix(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from megatron_async_rl.controller.journal.events import GroupAdmitted
        from megatron_async_rl.controller.journal.journal import Journal
        journal = Journal(Path(sys.argv[1]))
        for number in range(10**9):
            journal.append([GroupAdmitted(number, str(number))])
            if number % 50 == 0:
                journal.flush().result(60)
                print(number, flush=True)
        """
    )
    for kill_after in (1, 4):
        path = tmp_path / str(kill_after) / "journal.sqlite"
        path.parent.mkdir()
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout
        told = [int(child.stdout.readline()) for _ in range(kill_after)]
        os.kill(child.pid, signal.SIGKILL)
        child.wait(60)
        numbers = [fact.group_id for fact in read_events(path)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > told[-1]  # everything flushed is on disk
        child.stdout.close()


def test_full_disk_delays_events_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.05)
    journal = Journal(tmp_path / "journal.sqlite")
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite fails as on a full disk
    events = journal_events() * 60
    journal.append(events)
    waiter = journal.flush()
    with pytest.raises(TimeoutError):
        waiter.result(1.0)
    while not journal.error:  # on a machine that is slower still
        time.sleep(0.01)
    assert "full" in journal.error and not waiter.done()
    journal._db.execute("PRAGMA max_page_count = 1000000")
    waiter.result(60)
    assert journal.error == ""
    assert sum(1 for _ in journal.events()) == len(events)
    journal.close()


def test_recorded_batch_can_be_read_until_it_is_pruned(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append(journal_events())
    journal.flush().result(60)
    admitted, returned, scored = read_batch(journal.path, 1)
    assert len(admitted) == 2 and len(returned) == len(scored) == 4
    journal.prune([fact.group_id for fact in admitted])
    journal.flush().result(60)
    with pytest.raises(DataError, match="older than the two that a run keeps"):
        read_batch(journal.path, 1)
    assert state(list(journal.events()))[0] == 2  # the ledger still counts both batches
    journal.close()


def test_damaged_journal_is_rejected_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match="--from-scratch"):
        Journal(path)


def test_journal_of_another_schema_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(DataError, match="schema 99"):
        Journal(path)


def test_changed_dataset_is_rejected() -> None:
    with pytest.raises(DataError, match=r"data\.train now gives '0'"):
        restart_core(make_core(), [GroupAdmitted(0, "another")])


# ---- checkpoints on disk


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "swap"])
def test_any_damage_to_a_checkpoint_file_is_detected(tmp_path: Path, damage: str) -> None:
    manifest = write_checkpoint(tmp_path, 4)
    assert checkpoints.find_damage(tmp_path, manifest) == ""
    folder = tmp_path / checkpoints.FOLDER / manifest.folder
    first, second = folder / "__0_0.distcp", folder / "__1_0.distcp"
    if damage == "flip":
        first.write_bytes(first.read_bytes()[:-1] + b"\xff")
    elif damage == "truncate":
        first.write_bytes(first.read_bytes()[:-1])
    elif damage == "delete":
        first.unlink()
    else:
        one, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(one)
    assert "__0_0.distcp" in checkpoints.find_damage(tmp_path, manifest)
    shares = [checkpoints.find_damage(tmp_path, manifest, part, 2) for part in (0, 1)]
    assert any(shares)  # found by the rank that checks this share


def test_truncated_manifest_is_ignored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 4)
    path = tmp_path / checkpoints.FOLDER / "v000004.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert [manifest.version for manifest in checkpoints.list_manifests(tmp_path)] == [2]


def test_folder_with_an_unfinished_file_is_not_committed(tmp_path: Path) -> None:
    folder = tmp_path / checkpoints.FOLDER / "v000001"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(DataError, match="files and digests differ"):
        checkpoints.commit(tmp_path, 1, "v000001", 0, 0)
    with pytest.raises(DataError, match="v000002 has no files"):  # pruned meanwhile
        checkpoints.commit(tmp_path, 2, "v000002", 0, 0)


def test_prune_keeps_two_checkpoints_and_unfinished_folders(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        write_checkpoint(tmp_path, version)
    (tmp_path / checkpoints.FOLDER / "v000004").mkdir()
    assert checkpoints.prune(tmp_path, 2) == 2
    assert sorted(path.name for path in (tmp_path / checkpoints.FOLDER).iterdir()) == [
        "v000002", "v000002.json", "v000003", "v000003.json", "v000004",
    ]  # fmt: skip


# ---- audit


def test_audit_recounts_the_journal_and_finds_mismatches(tmp_path: Path) -> None:
    events = journal_events()
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append(events)
    journal.close()
    (tmp_path / "samples.jsonl").touch()
    result = audit.audit(tmp_path, eta=1)
    assert (result.trained, result.lost, result.duplicated, result.breaches) == (4, 0, 0, [])
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append([events[0], events[-2]])  # a group admitted twice, a sample returned twice
    journal.close()
    result = audit.audit(tmp_path, eta=1)
    assert result.duplicated >= 1 and result.breaches


@pytest.mark.parametrize(
    ("trained_on", "is_recorded", "is_breach"),
    [(1, True, False), (2, True, True), (1, False, True)],
)
def test_audit_judges_each_step_by_the_staleness_that_applied_to_it(
    tmp_path: Path, trained_on: int, is_recorded: bool, is_breach: bool
) -> None:
    """A resumed run may have a lower limit; only later batches obey it."""
    limits = (1, 0) if is_recorded else (None, None)
    journal = Journal(tmp_path / "journal.sqlite")
    for epoch in (1, 2):
        journal.append([ControllerStarted(epoch, limits[epoch - 1])])
        journal.append([BatchSelected(epoch, [epoch])])
    journal.close()
    sample = make_sample(trained_on - 1)
    group = TrainedGroup(trained_on, "prompt", [sample], [1.0], [0.0])
    line = sample_line(trained_on, group, 0, True)
    (tmp_path / SAMPLES_FILE).write_bytes(encode_line(line))
    result = audit.audit(tmp_path, eta=0)
    found = [b for b in result.breaches if f"was trained on {trained_on} with tokens" in b]
    assert bool(found) == is_breach
    assert (result.max_staleness, result.staleness_limit) == (1, int(is_recorded))
