"""Damaged files of a run are noticed by name, or the damage changes nothing that is read."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import pytest
from journal_builders import journal_events, write_run_folder

from megatron_async_rl.cli import audit
from megatron_async_rl.controller.journal import journal as journal_module
from megatron_async_rl.controller.journal.events import AnyEvent
from megatron_async_rl.controller.journal.journal import Journal, last_seq, read_events
from megatron_async_rl.controller.journal.mark import MARK_FILE
from megatron_async_rl.errors import DataError
from megatron_async_rl.launcher import run
from megatron_async_rl.observability.sample_log import last_version, read_samples
from megatron_async_rl.protocol.wire import Codec
from megatron_async_rl.storage import checkpoints

ETA = 1  # max_staleness of journal_events
NUM_DAMAGES = 60  # of each kind of folder


def encoded(events: list[AnyEvent]) -> list[list[bytes]]:
    codec = Codec(AnyEvent)
    return [[bytes(frame) for frame in codec.encode(event)] for event in events]


def contents(run_dir: Path) -> tuple:
    """Returns everything that a run, or a reader of its log, would read."""
    return (
        encoded(list(read_events(run_dir / "journal.sqlite"))),
        [(m, checkpoints.find_damage(run_dir, m)) for m in checkpoints.list_manifests(run_dir)],
        list(read_samples(run_dir)),
    )


def damage(path: Path, draw: random.Random) -> str:
    """Flips a bit, truncates, or zeroes a part of the file; returns the name of the damage."""
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    kind = draw.choice(["flip", "truncate", "zero"])
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del data[at:]
    else:
        size = draw.choice([1, 16, 512, 4096])
        data[at : at + size] = bytes(len(data[at : at + size]))
    path.write_bytes(data)
    return f"{kind} at {at}"


def resume(run_dir: Path) -> list[AnyEvent]:
    """Opens the journal as a controller that restarts does."""
    last_version(run_dir / "samples.jsonl")
    journal = Journal(run_dir / "journal.sqlite")
    try:
        return list(journal.events())
    finally:
        journal.close()


@pytest.mark.parametrize("keep_wal", [False, True])
def test_every_damage_is_noticed_by_name_or_harmless(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keep_wal: bool
) -> None:
    write_run_folder(tmp_path / "run", keep_wal)
    original = tmp_path / "original"
    shutil.copytree(tmp_path / "run", original)
    assert audit.run(original, ETA) == 0
    assert "damage" not in capsys.readouterr().out
    shutil.rmtree(original)
    shutil.copytree(tmp_path / "run", original)
    expected, expected_events = contents(original), encoded(resume(original))
    files = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert {"journal.sqlite", MARK_FILE, "000001.bin", "samples.jsonl", "v000003.json"} <= {
        path.name for path in files
    }
    assert keep_wal == any(path.name.endswith("-wal") for path in files)
    files += 3 * [path for path in files if path.name.startswith("journal.sqlite")]
    draw = random.Random(11 + keep_wal)
    num_noticed = num_stopped = 0
    for number in range(NUM_DAMAGES):
        source = draw.choice(files)
        if not source.stat().st_size:
            continue
        run_dir = tmp_path / f"damaged-{number}"
        shutil.copytree(tmp_path / "run", run_dir)
        path = run_dir / source.relative_to(tmp_path / "run")
        what = f"{path.name}: {damage(path, draw)}"
        name = path.name.removesuffix("-wal")
        try:
            audit.run(run_dir, ETA)
            said = capsys.readouterr().out
        except DataError as e:
            said = str(e)
        if name in said:
            num_noticed += 1
        else:
            assert contents(run_dir) == expected, what
        try:
            assert encoded(resume(run_dir)) == expected_events, what
        except DataError as e:
            num_stopped += 1
            assert name in str(e) or path.parent.name in str(e), what
        shutil.rmtree(run_dir)
    assert num_stopped
    print(f"of {NUM_DAMAGES} damages {num_noticed} were named and {num_stopped} stop the run")
    assert num_noticed > NUM_DAMAGES // 3


def test_rewound_wal_is_refused_by_run_and_named_by_audit(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_run_folder(run_dir, keep_wal=True)
    seq = last_seq(run_dir / "journal.sqlite")
    wal = run_dir / "journal.sqlite-wal"
    data = bytearray(wal.read_bytes())
    data[len(data) * 2 // 3] ^= 1  # above the newest checkpoint
    wal.write_bytes(data)
    found = audit.audit(run_dir, ETA)
    assert any(f"but event {seq} and commit" in damage for damage in found.damages)
    with pytest.raises(DataError, match=rf"was rewound: it ends at event \d+ .* but event {seq} "):
        Journal(run_dir / "journal.sqlite")


@pytest.mark.parametrize("sql", [
    "UPDATE events SET record = CAST(record || 'x' AS BLOB) WHERE kind = 'SampleScored'",
    "UPDATE events SET group_id = 77 WHERE seq = 3",
    "DELETE FROM events WHERE seq = 5",
    "UPDATE totals SET num_rows = num_rows + 1",
])  # fmt: skip
def test_changed_or_missing_rows_are_refused(tmp_path: Path, sql: str) -> None:
    write_run_folder(tmp_path / "run", keep_wal=False)
    path = tmp_path / "run" / "journal.sqlite"
    with sqlite3.connect(path) as db:
        db.execute(sql)
    with pytest.raises(DataError, match=r"journal\.sqlite.*; lost: .*--from-scratch"):
        resume(tmp_path / "run")
    found = audit.audit(tmp_path / "run", ETA)
    assert any("journal.sqlite" in damage and "lost: " in damage for damage in found.damages)


def test_database_that_is_damaged_while_it_is_written_fails_all_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal.sqlite")

    def refuse(*_: object) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(journal, "_row", refuse)
    journal.append(journal_events()[:2])
    for _ in range(2):
        with pytest.raises(DataError, match=r"journal\.sqlite is damaged: .*malformed; lost: "):
            journal.flush().result(10)
    with pytest.raises(DataError, match="malformed"):
        journal.append(journal_events()[:2])
    journal.close()
    assert journal_module.last_seq(tmp_path / "journal.sqlite") == 0


def test_journal_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be opened: there is no folder .*/no; set run.dir"):
        Journal(tmp_path / "no" / "journal.sqlite")
    (tmp_path / "journal.sqlite").mkdir()
    with pytest.raises(DataError, match="cannot be opened: unable to open database file; let this"):
        Journal(tmp_path / "journal.sqlite")


def test_damaged_mark_is_reported_and_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run_folder(tmp_path / "run", keep_wal=False)
    mark = tmp_path / "run" / MARK_FILE
    mark.write_bytes(b"0" * 30)
    resume(tmp_path / "run")
    assert "journal.mark is damaged" in caplog.text
    caplog.clear()
    resume(tmp_path / "run")
    assert not caplog.text


@pytest.mark.parametrize("missing", ["journal.sqlite", "config.yaml"])
def test_folder_of_a_run_without_a_needed_file_is_refused(tmp_path: Path, missing: str) -> None:
    write_run_folder(tmp_path / "run", keep_wal=False)
    (tmp_path / "run" / "config.yaml").write_text("run: {}")
    run._check_nothing_is_missing(tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(DataError, match=rf"{missing} is missing, but there is .*--from-scratch"):
        run._check_nothing_is_missing(tmp_path / "run")


def test_audit_without_a_readable_configuration_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run_folder(tmp_path / "run", keep_wal=False)
    for garbage in (b"\xff\xfe\x00", b"run: [", b""):
        (tmp_path / "run" / "config.yaml").write_bytes(garbage)
        assert audit.run(tmp_path / "run") == 1
        assert "config.yaml" in capsys.readouterr().out
