"""Reads the journal and verifies every row; the journal may be in use.

A row has a crc32 over all its columns; the table `totals` has the number of rows and the sum of
their checksums, which reveals rows that are gone; journal.mark reveals a rewound database.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import msgspec

from megatron_async_rl.controller.journal.array_store import ArrayLocation, ArrayReader
from megatron_async_rl.controller.journal.events import (
    AnyEvent,
    BatchSelected,
    GroupAdmitted,
    SampleReturned,
    SampleScored,
)
from megatron_async_rl.controller.journal.mark import MARK_FILE, read_mark
from megatron_async_rl.controller.journal.partials import Partials, StoredEvent
from megatron_async_rl.errors import DataError, ProtocolError
from megatron_async_rl.protocol.wire import Codec

ARRAYS_FOLDER = "journal.arrays"  # beside the database
SCHEMA = 4
REMEDY = (
    "restore run.dir from a copy, or start over with --from-scratch, which keeps the old folder "
    "aside"
)
_COLUMNS = "seq, kind, group_id, record, segment, crc"
OnDamage = Callable[[str], None]


class Totals(msgspec.Struct):
    """Totals over the rows in the table; pruned rows are subtracted."""

    num_commits: int = 0
    last_seq: int = 0
    num_rows: int = 0
    crc_sum: int = 0


def row_crc(*columns: object) -> int:
    """Returns the checksum of seq, kind, group_id, record and segment."""
    return zlib.crc32(msgspec.msgpack.encode(columns))


def refuse(damage: str) -> None:
    raise DataError(damage, REMEDY)


def read_events(
    path: Path, until: int | None = None, on_damage: OnDamage = refuse
) -> Iterator[AnyEvent]:
    """Yields all events in order, up to sequence number `until`.

    `on_damage` gets a text for each damage: the file and the lost content. By default it raises
    DataError; with another function the rest is read as far as possible.
    """
    if until is None and (damage := find_rewind(path)):
        on_damage(damage)
    last = (1 << 63) - 1 if until is None else until
    found = Totals()
    with closing(connect_to_read(path)) as db:
        try:
            db.execute("BEGIN")  # totals and rows of the same commit
            expected = read_totals(db)
            yield from select(db, path, "WHERE seq <= ? ORDER BY seq", (last,), on_damage, found)
        except sqlite3.DatabaseError as e:
            on_damage(f"{path} is damaged: {e}; lost: all events after number {found.last_seq}")
            return
    same = (found.num_rows, found.crc_sum) == (expected.num_rows, expected.crc_sum)
    if until is None and not same:
        on_damage(
            f"{path} has {found.num_rows} rows where {expected.num_rows} were written, or others; "
            "lost: events somewhere before number "
            f"{expected.last_seq}"
        )


def read_batch(
    path: Path, version: int
) -> tuple[list[GroupAdmitted], list[SampleReturned], list[SampleScored]]:
    """Returns the events of the batch trained on `version`. Raises DataError if pruned."""
    try:
        with closing(connect_to_read(path)) as db:
            batches = select(db, path, "WHERE kind = 'BatchSelected' ORDER BY seq DESC")
            selected = (event for event in batches if isinstance(event, BatchSelected))
            group_ids = next(event.group_ids for event in selected if event.version == version)
            marks = ",".join("?" * len(group_ids))
            where = f"WHERE group_id IN ({marks}) ORDER BY seq"
            found = list(select(db, path, where, tuple(group_ids)))
    except StopIteration:
        raise DataError(f"the journal {path} has no batch of version {version}") from None
    except sqlite3.DatabaseError as e:
        raise damaged(path, e) from None
    returned = [event for event in found if isinstance(event, SampleReturned)]
    if {event.group_id for event in returned} != set(group_ids):
        raise DataError(
            f"the journal {path} no longer holds the samples trained on version {version}: the "
            "checkpoint is older than the two that a run keeps; start over with --from-scratch"
        )
    admitted = [event for event in found if isinstance(event, GroupAdmitted)]
    admitted.sort(key=lambda event: group_ids.index(event.group_id))
    return admitted, returned, [event for event in found if isinstance(event, SampleScored)]


def damaged(path: Path, error: Exception) -> DataError:
    lost = "the events in the damaged part, perhaps all"
    return DataError(f"{path} is damaged: {error}; lost: {lost}", REMEDY)


def select(
    db: sqlite3.Connection,
    path: Path,
    where: str,
    values: tuple[int, ...] = (),
    on_damage: OnDamage = refuse,
    found: Totals | None = None,
) -> Iterator[AnyEvent]:
    """Yields the events of the rows that match; adds them to `found`."""
    found = found or Totals()
    codec, partials = Codec(StoredEvent), Partials()
    with closing(ArrayReader(path.with_name(ARRAYS_FOLDER))) as arrays:
        for *row, crc in db.execute(f"SELECT {_COLUMNS} FROM events {where}", values):
            seq, kind, group_id, record, segment = row
            name = f"event {seq} ({kind}{'' if group_id is None else f' of group {group_id}'})"
            if crc != row_crc(*row):
                on_damage(f"{path}: the row of {name} does not match its checksum; lost: the event")
                continue
            found.last_seq, found.num_rows = seq, found.num_rows + 1
            found.crc_sum += crc
            try:
                if segment is None:
                    event = partials.read(codec.decode([record]))
                else:
                    location = msgspec.msgpack.decode(record, type=ArrayLocation)
                    event = partials.read(codec.decode(arrays.read(location)))
            except (DataError, ProtocolError, msgspec.DecodeError) as e:
                on_damage(f"{e}; lost: {name}")
            else:
                yield event


def count_rows(db: sqlite3.Connection, path: Path) -> Counter[int]:
    """Returns how many rows have arrays in each segment. Raises DataError for a damaged row.

    A segment without rows is deleted, so a damaged row must be found before.
    """
    counts: Counter[int] = Counter()
    for *row, crc in db.execute(f"SELECT {_COLUMNS} FROM events WHERE segment IS NOT NULL"):
        if crc != row_crc(*row):
            refuse(
                f"{path}: the row of event {row[0]} does not match its checksum; lost: the event"
            )
        counts[row[-1]] += 1
    return counts


def find_rewind(path: Path) -> str:
    """Describes the loss if the journal lacks events that were on disk; empty if it has them."""
    try:
        seq, num_commits = read_mark(path.with_name(MARK_FILE)) or (0, 0)
    except DataError:
        return ""  # see find_mark_damage
    found = _totals_of(path)
    if num_commits <= found.num_commits:
        return ""
    lost = f"events {found.last_seq + 1} to {seq}, perhaps with batches that were trained"
    if seq == found.last_seq:
        lost = "which samples were pruned"
    return (
        f"{path} (or its -wal) was rewound: it ends at event {found.last_seq} and commit "
        f"{found.num_commits}, but event {seq} and commit {num_commits} were on disk "
        f"({MARK_FILE}); lost: {lost}"
    )


def find_mark_damage(path: Path) -> str:
    """Describes a damaged or missing mark, which proves nothing about the journal."""
    try:
        missing = read_mark(path.with_name(MARK_FILE)) is None and last_seq(path) > 0
    except DataError as e:
        return str(e)
    lost = "lost: the proof that the journal was not rewound"
    return f"{path.with_name(MARK_FILE)} is missing; {lost}" if missing else ""


def last_seq(path: Path) -> int:
    """Returns the number of the newest event, 0 if there is none. Raises DataError."""
    return _totals_of(path).last_seq


def _totals_of(path: Path) -> Totals:
    with closing(connect_to_read(path)) as db:
        try:
            return read_totals(db)
        except sqlite3.DatabaseError as e:
            raise DataError(f"{path} is damaged: {e}; lost: the journal", REMEDY) from None


def read_totals(db: sqlite3.Connection) -> Totals:
    """Returns the totals as written. Raises sqlite3.DatabaseError."""
    schema = db.execute("PRAGMA user_version").fetchone()[0]
    if schema not in (0, SCHEMA):
        raise sqlite3.DatabaseError(f"it has schema {schema}, this program reads {SCHEMA}")
    if not db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
        return Totals()  # an empty file, which the mark distinguishes from a new one
    columns = ", ".join(Totals.__struct_fields__)
    rows = db.execute(f"SELECT {columns} FROM totals").fetchall()
    if len(rows) != 1 or not all(type(value) is int for value in rows[0]):
        raise sqlite3.DatabaseError("its table of totals is damaged")
    return Totals(*rows[0])


def find_structural_damage(db: sqlite3.Connection) -> str:
    """Returns the first problem of pages and indexes that SQLite finds; empty if there is none."""
    found = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
    return "" if found == "ok" else " ".join(found.split())


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Opens the database without creating, checkpointing or changing it. Raises DataError."""
    try:
        db = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)
    except sqlite3.DatabaseError as e:
        raise DataError(f"{path} cannot be opened: {e}; lost: the journal", REMEDY) from None
    db.text_factory = lambda text: text.decode(errors="replace")  # damaged text has no checksum
    return db
