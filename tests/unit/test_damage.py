"""Damaged files of a run are noticed by name, or the damage changes nothing that is read."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from config_builders import config_tree
from journal_builders import journal_events, write_run_folder

from megatron_async_rl.__main__ import main
from megatron_async_rl.cli import audit
from megatron_async_rl.config import load
from megatron_async_rl.controller.journal import journal as journal_module
from megatron_async_rl.controller.journal.events import AnyEvent
from megatron_async_rl.controller.journal.journal import Journal, last_seq, read_events
from megatron_async_rl.controller.journal.mark import MARK_FILE
from megatron_async_rl.data import digests
from megatron_async_rl.errors import DataError
from megatron_async_rl.launcher import run
from megatron_async_rl.observability.sample_log import last_version, read_samples
from megatron_async_rl.protocol.wire import Codec
from megatron_async_rl.storage import checkpoints, exported, hook_digests, model_digests

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


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def exchange(path: Path) -> None:
    others = [*sorted(path.parent.iterdir()), path.parents[1] / "config.yaml"]
    other = next(file for file in others if file.is_file() and file != path)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


OTHER_DAMAGES: dict[str, Callable[[Path], object]] = {
    "directory": make_directory,
    "loop of links": make_loop,
    "other type": lambda path: path.write_bytes(b"[1, 2]"),
    "no UTF-8": lambda path: path.write_bytes(b'{"state": "\xff", "version": "\xff"}'),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "exchanged": exchange,
}
NAMES = (
    "config.yaml", "dataset.json", "model_files.json", "hooks.json", "status.json",
    "journal.sqlite", "journal.mark", "journal.arrays/000001.bin", "samples.jsonl",
    "checkpoints/v000003/__0_0.distcp",
)  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_DAMAGES)
def test_files_replaced_by_something_else_are_named(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    config = load.load_run(whole_run)
    for name in NAMES:
        run_dir = tmp_path / name.replace("/", "-")
        shutil.copytree(whole_run, run_dir)
        OTHER_DAMAGES[kind](run_dir / name)
        short, optional = Path(name).name, name.endswith(".json")
        code, said = main(["audit", str(run_dir)]), "".join(capsys.readouterr())
        if not (optional and kind in ("missing", "loop of links")):
            assert short in said, said
            assert code or name == "samples.jsonl"
        try:  # as the next start reads them
            load.load_run(run_dir)
            hook_digests.record(run_dir, config)
            digests.changed_data(run_dir, config)
            model_digests.changed(run_dir, config)
            last_version(run_dir / "samples.jsonl")
            list(read_events(run_dir / "journal.sqlite"))
        except DataError as e:
            assert short in str(e) or kind == "exchanged", (name, str(e))
        except OSError as e:  # the command line makes one line of it
            assert short in str(e) and kind in ("directory", "loop of links")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    write_run_folder(run_dir, keep_wal=False)
    config = load.from_tree(config_tree(**{"staleness.max_staleness": ETA}))
    (run_dir / "config.yaml").write_text(load.dump(config))
    named = {"a": "b"}
    for record, content in (
        ("dataset", named), ("model_files", named), ("hooks", {}), ("status", {"version": 3}),
    ):  # fmt: skip
        (run_dir / f"{record}.json").write_text(json.dumps(content))
    assert main(["audit", str(run_dir)]) == 0
    return run_dir


def test_changed_file_of_an_exported_policy_is_named(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "run" / "policy-v2"
    shutil.copytree(whole_run, run_dir)
    out.mkdir()
    header = json.dumps({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    weights = out / "model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    (out / "config.json").write_text("{}")
    exported.write_digests(out, {})
    assert main(["audit", str(run_dir)]) == 0
    assert "policy" not in capsys.readouterr().out
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # the header does not show it
    assert main(["audit", str(run_dir)]) == 1
    damage = f"damage: {weights} does not match its digest; lost: the exported policy"
    assert damage in capsys.readouterr().out.splitlines()
    weights.write_bytes(whole)
    (out / "config.json").unlink()
    assert main(["audit", str(run_dir)]) == 1
    assert f"{out / 'config.json'}: No such file" in capsys.readouterr().out
    (out / exported.DIGESTS_FILE).unlink()
    assert main(["audit", str(run_dir)]) == 0
    assert f"note: {out} has no digests.json" in capsys.readouterr().out


def test_missing_records_of_the_last_start_are_named(whole_run: Path, tmp_path: Path) -> None:
    assert list(run._missing_records(whole_run)) == []
    assert list(run._missing_records(tmp_path)) == []  # a new run
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    (run_dir / "dataset.json").unlink()
    [text] = run._missing_records(run_dir)
    assert text.startswith(f"{run_dir / 'dataset.json'} is missing; lost: whether the datasets are")


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
            journal.flush().result(60)
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
