"""The journal events of a run on disk: SQLite in WAL mode, one writer thread, shared commits.

`append` only queues; the writer commits all queued events together. Messages that other processes
cannot undo (a batch, a weight update) are sent only after `durable()`, so the trainer never knows
more than the journal.

A row is an event; one with arrays is stored in files beside the database (array_store.py), and its
row holds the location. Rows and arrays have checksums (reader.py). If the disk is full, the writer
keeps its events, retries every second and reports the error (`error`); only `durable()` waits. If
the database turns out to be damaged, `append` and `durable` raise DataError, which ends the run.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

import msgspec

from megatron_async_rl.controller.journal.array_store import ArrayStore
from megatron_async_rl.controller.journal.events import AnyEvent, JournalEvent
from megatron_async_rl.controller.journal.mark import MARK_FILE, Mark
from megatron_async_rl.controller.journal.partials import Partials, PartialTail, StoredEvent
from megatron_async_rl.controller.journal.reader import (
    ARRAYS_FOLDER,
    SCHEMA,
    count_rows,
    damaged,
    find_mark_damage,
    find_rewind,
    find_structural_damage,
    last_seq,
    read_events,
    read_totals,
    refuse,
    row_crc,
)
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.wire import Codec

logger = logging.getLogger(__name__)
JOURNAL_FILE = "journal.sqlite"
MAX_EVENTS_PER_COMMIT = 512
GATHER_S = 0.01  # an event waits this long for others to share its commit
RETRY_S = 1.0  # after a failed commit
NOT_OPENED = ("CANTOPEN", "PERM", "READONLY", "BUSY", "LOCKED")  # of SQLite's error codes
_Event = tuple[int, JournalEvent]  # with its sequence number
_Item = _Event | Future[None] | list[int] | None  # event, waiter, groups to prune, or the end
_Row = tuple[int, str, int | None, bytes, int | None, int]  # the columns; the checksum last

__all__ = ["ARRAYS_FOLDER", "JOURNAL_FILE", "Journal", "last_seq", "read_events"]


class Journal:
    """One per run. `append`, `durable` and `prune` belong to one thread.

    Raises DataError if the journal cannot be opened, is damaged, or has lost events that were on
    disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error = ""  # why the last commit failed; empty if it did not
        self.num_commits = 0
        self._damage: DataError | None = None  # found by the writer
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._open()
            rows_per_segment = count_rows(self._db, path)
        except sqlite3.DatabaseError as e:
            raise self._not_opened(e) or damaged(self.path, e) from None
        path.chmod(0o600)
        self.last_seq = self._totals.last_seq
        if damage := find_rewind(path):
            refuse(damage)
        if damage := find_mark_damage(path):
            logger.error("%s; the run continues and writes the mark again", damage)
        self._arrays = ArrayStore(path.with_name(ARRAYS_FOLDER), rows_per_segment)
        self._codec = Codec(StoredEvent)  # the writer's
        self._partials = Partials()
        self._mark = Mark(path.with_name(MARK_FILE))
        self._mark.write(self.last_seq, self._totals.num_commits)
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._write, name="journal", daemon=True)
        self._writer.start()

    # ---- writing

    def append(self, events: Iterable[JournalEvent]) -> None:
        """Queues events in order; returns at once. Raises DataError if the file is damaged."""
        if self._damage:
            raise self._damage
        for event in events:
            self.last_seq += 1
            self._items.put((self.last_seq, event))

    async def durable(self) -> None:
        """Returns when everything appended so far is on disk. Raises DataError."""
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
        self._mark.sync()
        self._mark.close()
        self._db.close()

    # ---- reading

    def events(self) -> Iterator[AnyEvent]:
        """Yields all events in order. Raises DataError at the first that is damaged."""
        return read_events(self.path)

    # ---- inside

    def _open(self) -> None:
        db = self._db
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        schema = db.execute("PRAGMA user_version").fetchone()[0]
        if schema not in (0, SCHEMA):
            raise sqlite3.DatabaseError(f"it has schema {schema}, this program writes {SCHEMA}")
        if damage := find_structural_damage(db):
            raise sqlite3.DatabaseError(damage)
        db.execute("BEGIN IMMEDIATE")
        db.execute(
            "CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, "
            "group_id INTEGER, record BLOB NOT NULL, segment INTEGER, crc INTEGER NOT NULL)"
        )
        db.execute(
            "CREATE TABLE IF NOT EXISTS totals (num_commits INTEGER NOT NULL, "
            "last_seq INTEGER NOT NULL, num_rows INTEGER NOT NULL, crc_sum INTEGER NOT NULL)"
        )
        db.execute("CREATE INDEX IF NOT EXISTS events_of_group ON events (group_id)")
        db.execute(
            "CREATE INDEX IF NOT EXISTS batches ON events (seq) WHERE kind = 'BatchSelected'"
        )
        if schema == 0:
            db.execute("INSERT INTO totals VALUES (0, 0, 0, 0)")
            db.execute(f"PRAGMA user_version = {SCHEMA}")
        db.execute("COMMIT")
        self._totals = read_totals(db)

    def _not_opened(self, error: sqlite3.DatabaseError) -> DataError | None:
        """Returns the error of a file that SQLite could not even read; None if it could."""
        if not self.path.parent.is_dir():
            return DataError(
                f"the journal {self.path} cannot be opened: there is no folder {self.path.parent}",
                "set run.dir to the folder of a run",
            )
        code = getattr(error, "sqlite_errorname", "")  # errors of this package have none
        if code.removeprefix("SQLITE_").split("_")[0] not in NOT_OPENED:
            return None
        return DataError(
            f"the journal {self.path} cannot be opened: {error}",
            "let this user read and write it and its folder, and stop other programs that use it",
        )

    def _write(self) -> None:
        while True:
            items = [self._items.get()]
            if isinstance(items[0], tuple):
                time.sleep(GATHER_S)  # no `durable` waits yet
            while len(items) < MAX_EVENTS_PER_COMMIT and not self._items.empty():
                items.append(self._items.get())
            events = [item for item in items if isinstance(item, tuple)]
            pruned = [group for item in items if isinstance(item, list) for group in item]
            waiters = [item for item in items if isinstance(item, Future)]
            if events or pruned:
                self._retry(self._commit, events, pruned)
            self._retry(self._write_mark, bool(waiters))
            for waiter in waiters:
                if not waiter.set_running_or_notify_cancel():
                    continue  # the waiting task was cancelled
                if self._damage:
                    waiter.set_exception(self._damage)
                elif not self.error:
                    waiter.set_result(None)
            if None in items:
                return

    def _retry(self, write: Callable[..., None], *values: object) -> None:
        """Repeats a write until it succeeds, the journal is closed, or damage is found."""
        while not self._damage:
            try:
                write(*values)
            except (sqlite3.OperationalError, OSError) as e:
                if self.error != str(e):
                    logger.error(
                        "the journal %s cannot be written: %s; trying again every %.0f s",
                        self.path, e, RETRY_S,
                    )  # fmt: skip
                self.error = str(e)
                if self._closing.wait(RETRY_S):
                    return
            except sqlite3.DatabaseError as e:
                self._damage = damaged(self.path, e)
                logger.error("%s", self._damage)
            except Exception as e:  # else `durable` would wait for a thread that has ended
                self._damage = DataError(
                    f"{self.path} cannot be written: {type(e).__name__}: {e}",
                    "run again to continue from the events before it, and report this error",
                )
                logger.exception("%s", self._damage)
            else:
                if self.error:
                    logger.warning("the journal can be written again")
                self.error = ""
                return

    def _commit(self, events: list[_Event], pruned: list[int]) -> None:
        position, totals = self._arrays.position, msgspec.structs.replace(self._totals)
        freed: list[int] = []
        try:
            stored = self._partials.to_store([event for _, event in events])
            rows = [self._row(seq, event) for (seq, _), event in zip(events, stored, strict=True)]
            self._arrays.sync()
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", rows)
            totals.last_seq = rows[-1][0] if rows else totals.last_seq
            totals.num_commits += 1
            totals.num_rows += len(rows)
            totals.crc_sum += sum(row[-1] for row in rows)
            for group in pruned:
                deleted = self._db.execute(
                    "DELETE FROM events WHERE group_id = ? AND segment IS NOT NULL "
                    "RETURNING segment, crc",
                    (group,),
                )
                for segment, crc in deleted:
                    freed.append(segment)
                    totals.num_rows -= 1
                    totals.crc_sum -= crc
            self._db.execute(
                "UPDATE totals SET num_commits = ?, last_seq = ?, num_rows = ?, crc_sum = ?",
                msgspec.structs.astuple(totals),
            )
            self._db.execute("COMMIT")
        except (sqlite3.DatabaseError, OSError):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._arrays.rewind(position)
            raise
        self._totals = totals
        for _, event in events:
            self._partials.saw(event)
        self._arrays.count_rows([row[4] for row in rows if row[4] is not None], freed)
        self.num_commits += 1

    def _write_mark(self, durably: bool) -> None:
        self._mark.write(self._totals.last_seq, self._totals.num_commits)
        if durably:  # a batch or an update is about to be sent
            self._mark.sync()

    def _row(self, seq: int, event: JournalEvent | PartialTail) -> _Row:
        frames = self._codec.encode(event)
        record, segment = bytes(frames[0]), None
        if len(frames) > 1:
            location = self._arrays.write(frames)
            record, segment = msgspec.msgpack.encode(location), location.segment
        row = (seq, type(event).__name__, getattr(event, "group_id", None), record, segment)
        return (*row, row_crc(*row))
