"""The journal events of a run on disk: SQLite in WAL mode, one writer thread, shared commits.

`append` only queues; the writer commits all queued events together. Messages that other processes
cannot undo (a batch, a weight update) are sent only after `durable()`, so the trainer never knows
more than the journal.

A row is an event; one with arrays is stored in files beside the database (array_store.py), and its
row holds the location. If the disk is full, the writer keeps its events, tries again every second
and reports it (`error`); only `durable()` waits.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

import msgspec

from megatron_async_rl.controller.core.events import (
    AnyEvent,
    BatchSelected,
    GroupAdmitted,
    JournalEvent,
    SampleReturned,
    SampleScored,
)
from megatron_async_rl.controller.journal.array_store import ArrayLocation, ArrayReader, ArrayStore
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.wire import Codec

logger = logging.getLogger(__name__)
JOURNAL_FILE = "journal.sqlite"
ARRAYS_FOLDER = "journal.arrays"  # beside the file
SCHEMA = 3
MAX_EVENTS_PER_COMMIT = 512
GATHER_S = 0.01  # an event waits this long for others to share its commit
RETRY_S = 1.0  # after a failed commit
_Event = tuple[int, JournalEvent]  # with its sequence number
_Item = _Event | Future[None] | list[int] | None  # event, waiter, groups to prune, or the end
_Row = tuple[int, str, int | None, bytes, int | None]


class Journal:
    """One per run. `append`, `durable` and `prune` belong to one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.error = ""  # why the last commit failed; empty if it did not
        self.num_commits = 0
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._open()
        except sqlite3.DatabaseError as e:
            raise DataError(
                f"the journal {path} cannot be read: {e}; restore it from a copy, or start over "
                "with --from-scratch, which keeps the old folder aside"
            ) from None
        path.chmod(0o600)
        rows_per_segment = self._db.execute(
            "SELECT segment, COUNT(*) FROM events WHERE segment IS NOT NULL GROUP BY segment"
        ).fetchall()
        self._arrays = ArrayStore(path.with_name(ARRAYS_FOLDER), Counter(dict(rows_per_segment)))
        self._codec = Codec(AnyEvent)  # the writer's
        self.last_seq = last_seq(path)
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._write, name="journal", daemon=True)
        self._writer.start()

    # ---- writing

    def append(self, events: Iterable[JournalEvent]) -> None:
        """Queues events in order; returns at once."""
        for event in events:
            self.last_seq += 1
            self._items.put((self.last_seq, event))

    async def durable(self) -> None:
        """Returns when everything appended so far is on disk."""
        await asyncio.wrap_future(self.flush())

    def flush(self) -> Future[None]:
        """Returns a future that is done when everything appended so far is on disk."""
        waiter: Future[None] = Future()
        self._items.put(waiter)
        return waiter

    def prune(self, group_ids: list[int]) -> None:
        """Removes the samples of groups that no checkpoint can request again."""
        if group_ids:
            self._items.put(group_ids)

    def close(self) -> None:
        """Commits all queued events, unless the disk is full."""
        self._closing.set()
        self._items.put(None)
        self._writer.join()
        self._arrays.close()
        self._db.close()

    # ---- reading

    def events(self, after: int = 0) -> Iterator[AnyEvent]:
        """Yields all events in order, from sequence number `after` + 1 on."""
        yield from _select(self._path, "WHERE seq > ? ORDER BY seq", after)

    def batch(
        self, version: int
    ) -> tuple[list[GroupAdmitted], list[SampleReturned], list[SampleScored]]:
        """Returns the events of the batch trained on `version`. Raises DataError if pruned."""
        batches = _select(self._path, "WHERE kind = 'BatchSelected' ORDER BY seq DESC")
        wanted = next(
            (b for b in batches if isinstance(b, BatchSelected) and b.version == version), None
        )
        if wanted is None:
            raise DataError(f"the journal {self._path} has no batch of version {version}")
        marks = ",".join("?" * len(wanted.group_ids))
        where = f"WHERE group_id IN ({marks}) ORDER BY seq"
        events = list(_select(self._path, where, *wanted.group_ids))
        returned = [event for event in events if isinstance(event, SampleReturned)]
        if {event.group_id for event in returned} != set(wanted.group_ids):
            raise DataError(
                f"the journal {self._path} no longer holds the samples trained on version "
                f"{version}: the checkpoint is older than the two that a run keeps; start over "
                "with --from-scratch"
            )
        order = {group_id: position for position, group_id in enumerate(wanted.group_ids)}
        admitted = [event for event in events if isinstance(event, GroupAdmitted)]
        admitted.sort(key=lambda event: order[event.group_id])
        return admitted, returned, [event for event in events if isinstance(event, SampleScored)]

    # ---- inside

    def _open(self) -> None:
        db = self._db
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        schema = db.execute("PRAGMA user_version").fetchone()[0]
        if schema not in (0, SCHEMA):
            raise sqlite3.DatabaseError(f"it has schema {schema}, this program writes {SCHEMA}")
        db.execute(
            "CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, "
            "group_id INTEGER, record BLOB NOT NULL, segment INTEGER)"
        )
        db.execute("CREATE INDEX IF NOT EXISTS events_of_group ON events (group_id)")
        db.execute(
            "CREATE INDEX IF NOT EXISTS batches ON events (seq) WHERE kind = 'BatchSelected'"
        )
        db.execute(f"PRAGMA user_version = {SCHEMA}")

    def _write(self) -> None:
        while True:
            items = [self._items.get()]
            if isinstance(items[0], tuple):
                time.sleep(GATHER_S)  # no `durable` waits yet
            while len(items) < MAX_EVENTS_PER_COMMIT and not self._items.empty():
                items.append(self._items.get())
            events = [item for item in items if isinstance(item, tuple)]
            pruned = [group for item in items if isinstance(item, list) for group in item]
            if events or pruned:
                while not self._commit(events, pruned) and not self._closing.wait(RETRY_S):
                    pass
            for item in items:
                if isinstance(item, Future) and not self.error:
                    item.set_result(None)
            if None in items:
                return

    def _commit(self, events: list[_Event], pruned: list[int]) -> bool:
        position = self._arrays.position
        try:
            rows = [self._row(seq, event) for seq, event in events]
            self._arrays.sync()
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
            freed: list[int] = []
            for group in pruned:
                deleted = self._db.execute(
                    "DELETE FROM events WHERE group_id = ? AND segment IS NOT NULL "
                    "RETURNING segment",
                    (group,),
                )
                freed += [segment for (segment,) in deleted]
            self._db.execute("COMMIT")
        except (sqlite3.OperationalError, OSError) as e:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._arrays.rewind(position)
            if self.error != str(e):
                logger.error(
                    "the journal %s cannot be written: %s; trying again every %.0f s",
                    self._path, e, RETRY_S,
                )  # fmt: skip
            self.error = str(e)
            return False
        self._arrays.count_rows([segment for *_, segment in rows if segment is not None], freed)
        if self.error:
            logger.warning("the journal can be written again")
        self.error = ""
        self.num_commits += 1
        return True

    def _row(self, seq: int, event: JournalEvent) -> _Row:
        frames = self._codec.encode(event)
        record, segment = bytes(frames[0]), None
        if len(frames) > 1:
            location = self._arrays.write(frames)
            record, segment = msgspec.msgpack.encode(location), location.segment
        return seq, type(event).__name__, getattr(event, "group_id", None), record, segment


def read_events(path: Path, until: int | None = None) -> Iterator[AnyEvent]:
    """Yields all events in order, up to sequence number `until`; the journal may be in use."""
    last = (1 << 63) - 1 if until is None else until
    yield from _select(path, "WHERE seq <= ? ORDER BY seq", last)


def last_seq(path: Path) -> int:
    """Returns the number of the newest event, 0 if there is none; the journal may be in use."""
    db = sqlite3.connect(path)
    try:
        return int(db.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()[0])
    finally:
        db.close()


def _select(path: Path, where: str, *values: int) -> Iterator[AnyEvent]:
    codec = Codec(AnyEvent)
    arrays = ArrayReader(path.with_name(ARRAYS_FOLDER))
    db = sqlite3.connect(path)  # not the writer's connection, which may be in a transaction
    try:
        for record, segment in db.execute(f"SELECT record, segment FROM events {where}", values):
            if segment is None:
                yield codec.decode([record])
            else:
                location = msgspec.msgpack.decode(record, type=ArrayLocation)
                yield codec.decode(arrays.read(location))
    finally:
        db.close()
        arrays.close()
