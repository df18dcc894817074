"""The facts of a run on disk: SQLite in WAL mode, one writer thread, many facts per commit.

`append` only queues; the writer commits what has gathered. Before anything leaves the controller that could not be taken
back (a batch, a weight update) the shell awaits `durable()`: whatever the trainer has seen, the journal knows.

A row is a fact; one with arrays lies in files beside the database (spill.py), and its row tells where. A full disk stops
nothing at once: the writer keeps what it has, tries again every second and says so (`error`); only `durable()` waits.
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
from megatron_async_rl.controller.journal.array_store import ArrayReader, ArrayStore, Place
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.wire import Codec

logger = logging.getLogger(__name__)
JOURNAL_FILE = "journal.sqlite"
ARRAYS_FOLDER = "journal.arrays"  # beside the file
SCHEMA = 2
MAX_FACTS_PER_COMMIT = 512
GATHER_S = 0.01  # for which a fact waits for others
RETRY_S = 1.0  # after a failed commit
_Item = (
    tuple[int, JournalEvent] | Future[None] | list[int] | None
)  # a fact, a waiter, groups to prune, the end


class Journal:
    """One per run. `append`, `durable` and `prune` belong to one thread; reading is done before the first append."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.error = ""  # why the last commit failed; empty while all is well
        self.num_commits = 0
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._open()
        except sqlite3.DatabaseError as e:
            raise DataError(
                f"the journal {path} cannot be read: {e}; restore it from a copy, or begin anew with --from-scratch, "
                "which keeps the old folder aside"
            ) from None
        path.chmod(0o600)
        live = self._db.execute(
            "SELECT segment, COUNT(*) FROM facts WHERE segment IS NOT NULL GROUP BY segment"
        )
        self._spill = ArrayStore(path.with_name(ARRAYS_FOLDER), Counter(dict(live.fetchall())))
        self._codec = Codec(AnyEvent)  # the writer's
        self.last_seq: int = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM facts").fetchone()[
            0
        ]
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._write, name="journal", daemon=True)
        self._writer.start()

    # ---- writing

    def append(self, facts: Iterable[JournalEvent]) -> None:
        """Queues facts in order; returns at once."""
        for fact in facts:
            self.last_seq += 1
            self._items.put((self.last_seq, fact))

    async def durable(self) -> None:
        """Returns when all that was appended so far is on disk."""
        await asyncio.wrap_future(self.flush())

    def flush(self) -> Future[None]:
        """Done when all that was appended so far is on disk."""
        waiter: Future[None] = Future()
        self._items.put(waiter)
        return waiter

    def prune(self, group_ids: list[int]) -> None:
        """Forgets the tokens of groups that no checkpoint will ask for again; their ledger entries stay."""
        if group_ids:
            self._items.put(group_ids)

    def close(self) -> None:
        """Commits what is queued, unless the disk refuses it."""
        self._closing.set()
        self._items.put(None)
        self._writer.join()
        self._spill.close()
        self._db.close()

    # ---- reading

    def facts(self, after: int = 0) -> Iterator[AnyEvent]:
        """All facts in order, as they were recorded."""
        yield from _select(self._path, "WHERE seq > ? ORDER BY seq", after)

    def batch(
        self, version: int
    ) -> tuple[list[GroupAdmitted], list[SampleReturned], list[SampleScored]]:
        """What rebuilds the batch that was trained on `version`. Raises DataError when it was pruned."""
        batches = _select(self._path, "WHERE kind = 'BatchSelected' ORDER BY seq DESC")
        wanted = next(
            (f for f in batches if isinstance(f, BatchSelected) and f.version == version), None
        )
        if wanted is None:
            raise DataError(f"the journal {self._path} has no batch of version {version}")
        marks = ",".join("?" * len(wanted.group_ids))
        rows = list(
            _select(self._path, f"WHERE group_id IN ({marks}) ORDER BY seq", *wanted.group_ids)
        )
        returned = [fact for fact in rows if isinstance(fact, SampleReturned)]
        if {fact.group_id for fact in returned} != set(wanted.group_ids):
            raise DataError(
                f"the journal {self._path} no longer holds the samples trained on version {version}: the checkpoint is "
                "older than the two generations that a run keeps; begin anew with --from-scratch"
            )
        order = {group_id: place for place, group_id in enumerate(wanted.group_ids)}
        admitted = sorted(
            (f for f in rows if isinstance(f, GroupAdmitted)), key=lambda f: order[f.group_id]
        )
        return admitted, returned, [fact for fact in rows if isinstance(fact, SampleScored)]

    # ---- inside

    def _open(self) -> None:
        db = self._db
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        schema = db.execute("PRAGMA user_version").fetchone()[0]
        if schema not in (0, SCHEMA):
            raise sqlite3.DatabaseError(f"it has schema {schema}, this program writes {SCHEMA}")
        db.execute(
            "CREATE TABLE IF NOT EXISTS facts "
            "(seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, group_id INTEGER, record BLOB NOT NULL, segment INTEGER)"
        )
        db.execute("CREATE INDEX IF NOT EXISTS facts_of_group ON facts (group_id)")
        db.execute("CREATE INDEX IF NOT EXISTS batches ON facts (seq) WHERE kind = 'BatchSelected'")
        db.execute(f"PRAGMA user_version = {SCHEMA}")

    def _write(self) -> None:
        while True:
            items = [self._items.get()]
            if isinstance(
                items[0], tuple
            ):  # nobody waits yet: others will come to share the commit
                time.sleep(GATHER_S)
            while len(items) < MAX_FACTS_PER_COMMIT and not self._items.empty():
                items.append(self._items.get())
            facts = [item for item in items if isinstance(item, tuple)]
            pruned = [group for item in items if isinstance(item, list) for group in item]
            ends = None in items
            while (
                (facts or pruned)
                and not self._commit(facts, pruned)
                and not self._closing.wait(RETRY_S)
            ):
                pass
            for item in items:
                if isinstance(item, Future) and not self.error:
                    item.set_result(None)
            if ends:
                return

    def _commit(self, facts: list[tuple[int, JournalEvent]], pruned: list[int]) -> bool:
        position = self._spill.position
        try:
            rows = [self._row(seq, fact) for seq, fact in facts]
            self._spill.sync()
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO facts VALUES (?, ?, ?, ?, ?)", rows)
            freed: list[int] = []
            for group in pruned:
                delete = (
                    "DELETE FROM facts WHERE group_id = ? AND segment IS NOT NULL RETURNING segment"
                )
                freed += [segment for (segment,) in self._db.execute(delete, (group,))]
            self._db.execute("COMMIT")
        except (sqlite3.OperationalError, OSError) as e:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._spill.back_to(position)
            if self.error != str(e):
                logger.error(
                    "the journal %s cannot be written: %s; trying again every %.0f s",
                    self._path,
                    e,
                    RETRY_S,
                )
            self.error = str(e)
            return False
        self._spill.settle([segment for *_, segment in rows if segment is not None], freed)
        if self.error:
            logger.warning("the journal is written again")
        self.error = ""
        self.num_commits += 1
        return True

    def _row(self, seq: int, fact: JournalEvent) -> tuple[int, str, int | None, bytes, int | None]:
        frames = self._codec.encode(fact)
        record, segment = bytes(frames[0]), None
        if len(frames) > 1:
            place = self._spill.write(frames)
            record, segment = msgspec.msgpack.encode(place), place.segment
        return seq, type(fact).__name__, getattr(fact, "group_id", None), record, segment


def read_events(path: Path, until: int | None = None) -> Iterator[AnyEvent]:
    """All facts of a journal that may be in use, in order; `until`: those up to that number."""
    last = (1 << 63) - 1 if until is None else until
    yield from _select(path, "WHERE seq <= ? ORDER BY seq", last)


def last_seq(path: Path) -> int:
    """The number of the newest fact of a journal that may be in use."""
    db = sqlite3.connect(path)
    try:
        return db.execute("SELECT COALESCE(MAX(seq), 0) FROM facts").fetchone()[0]
    finally:
        db.close()


def _select(path: Path, which: str, *values: int) -> Iterator[AnyEvent]:
    codec = Codec(AnyEvent)
    arrays = ArrayReader(path.with_name(ARRAYS_FOLDER))
    db = sqlite3.connect(path)  # a connection of its own: the writer's may be inside a transaction
    try:
        for record, segment in db.execute(f"SELECT record, segment FROM facts {which}", values):
            if segment is None:
                yield codec.decode([record])
            else:
                yield codec.decode(arrays.read(msgspec.msgpack.decode(record, type=Place)))
    finally:
        db.close()
        arrays.close()
