"""The journal's arrays: plain files beside the database, appended to, never changed, and deleted whole.

    run.dir/journal.arrays/000001.bin, 000002.bin, ...    one after another, a new one with every life

SQLite copies a blob three times (page cache, WAL, database); here it is written once, into room that was allocated
before: 0.1 ms of CPU for 393 KB against 0.9. Order makes it safe: arrays first, forced to disk, then the row that tells
where they lie. What no row tells of does not exist; a file of which no row is left is deleted.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec

from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.wire import Frame
from megatron_async_rl.storage.files import sync

SEGMENT_BYTES = (
    256 << 20
)  # a file is closed at this size; it goes when the last group in it is pruned
ALLOCATE_BYTES = (
    8 << 20
)  # taken from the file system at once: growing a file write by write costs six times the CPU


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where the frames of one fact lie, end to end."""

    segment: int
    offset: int
    sizes: list[int]  # bytes of each frame
    crc: int  # crc32 of all


class ArrayStore:
    """The writer's end. `live`: how many rows of the database point into each segment."""

    def __init__(self, folder: Path, live: Counter[int]) -> None:
        self._folder = folder
        self._live = live
        folder.mkdir(mode=0o700, exist_ok=True)
        for path in folder.glob("*.bin"):
            if int(path.stem) not in live:
                path.unlink()  # written by an earlier life, and never told of
        self._segment = max(live, default=0) + 1
        self._offset = self._allocated = 0
        self._fd = -1  # opened by the first write

    @property
    def position(self) -> tuple[int, int]:
        return self._segment, self._offset

    def write(self, frames: list[Frame]) -> Place:
        """Appends; on disk after `sync`. Raises OSError, after which `back_to` gives up what was begun."""
        sizes = [len(frame) for frame in frames]
        total, crc = sum(sizes), 0
        for frame in frames:
            crc = zlib.crc32(frame, crc)
        if self._offset and self._offset + total > SEGMENT_BYTES:
            self.sync()
            self._go_to(self._segment + 1, 0)
        if self._fd < 0:
            self._open()
        if self._offset + total > self._allocated:
            length = max(ALLOCATE_BYTES, self._offset + total - self._allocated)
            os.posix_fallocate(self._fd, self._allocated, length)
            self._allocated += length
        if os.pwritev(self._fd, frames, self._offset) != total:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        place = Place(self._segment, self._offset, sizes, crc)
        self._offset += total
        return place

    def sync(self) -> None:
        if self._fd >= 0:
            os.fdatasync(self._fd)

    def back_to(self, position: tuple[int, int]) -> None:
        """Forgets what was written since: no row tells of it."""
        self._go_to(*position)

    def settle(self, written: Iterable[int], freed: Iterable[int]) -> None:
        """Rows that a commit has added and taken away, by segment; files that nobody needs any more go."""
        self._live.update(written)
        self._live.subtract(freed)
        for segment in [s for s, rows in self._live.items() if rows <= 0 and s != self._segment]:
            del self._live[segment]
            _path(self._folder, segment).unlink(missing_ok=True)

    def close(self) -> None:
        """Gives back what was allocated and not used."""
        if self._fd >= 0:
            os.ftruncate(self._fd, self._offset)
        self._go_to(self._segment, self._offset)

    def _open(self) -> None:
        path = _path(self._folder, self._segment)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._allocated = os.fstat(self._fd).st_size
        sync(self._folder)  # the name of a new file is its folder's

    def _go_to(self, segment: int, offset: int) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._segment, self._offset, self._allocated = -1, segment, offset, 0


class ArrayReader:
    """The reader's end, of a journal that may be in use: files are opened at once, so that pruning takes none away."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fds = {int(path.stem): os.open(path, os.O_RDONLY) for path in folder.glob("*.bin")}

    def read(self, place: Place) -> list[memoryview]:
        """The frames. Raises DataError where they are not what was written."""
        fd = self._fds.get(place.segment)
        if fd is None and (path := _path(self._folder, place.segment)).exists():
            fd = self._fds[place.segment] = os.open(path, os.O_RDONLY)  # begun since
        total = sum(place.sizes)
        block = memoryview(os.pread(fd, total, place.offset) if fd is not None else b"")
        if len(block) != total or zlib.crc32(block) != place.crc:
            raise DataError(
                f"the journal's {_path(self._folder, place.segment)} is missing or damaged at byte {place.offset}; restore "
                "it from a copy, or begin anew with --from-scratch, which keeps the old folder aside"
            )
        frames, start = [], 0
        for size in place.sizes:
            frames.append(block[start : start + size])
            start += size
        return frames

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)


def _path(folder: Path, segment: int) -> Path:
    return folder / f"{segment:06d}.bin"
