"""The high-water mark: the newest event and the commits on disk, in a file beside the database.

SQLite silently ends a damaged WAL at its last intact commit, so the database alone does not show
that it was rewound. The mark is overwritten after each commit and synced to disk before a batch or
an update is sent; it is never ahead of the database.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from megatron_async_rl.errors import DataError

MARK_FILE = "journal.mark"
LOST = "lost: the proof that the journal was not rewound"
REMEDY = "delete the file to continue without it"


class Mark:
    """The writer."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as e:
            raise DataError(f"{path} cannot be written: {e.strerror}", REMEDY) from None

    def write(self, seq: int, num_commits: int) -> None:
        """Overwrites the mark, in one sector; a killed process cannot tear it."""
        text = b"%020d %020d" % (seq, num_commits)
        os.pwrite(self._fd, b"%s %08x\n" % (text, zlib.crc32(text)), 0)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def read_mark(path: Path) -> tuple[int, int] | None:
    """Returns (number of the newest event on disk, number of commits); None if there is no file.

    Raises DataError if the file is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}; {LOST}", REMEDY) from None
    text = data[:41]
    if data != b"%s %08x\n" % (text, zlib.crc32(text)) or len(text.split()) != 2:
        raise DataError(f"{path} is damaged; {LOST}", REMEDY)
    seq, num_commits = map(int, text.split())
    return seq, num_commits
