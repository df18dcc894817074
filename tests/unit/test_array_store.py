"""The journal's arrays on disk: written before their row, removed with their last group."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from journal_builders import NUM_TOKENS, sample_returned
from paths import python_environment

from megatron_async_rl.controller.journal import array_store
from megatron_async_rl.controller.journal import journal as journal_module
from megatron_async_rl.controller.journal.events import AnyEvent, SampleReturned
from megatron_async_rl.controller.journal.journal import ARRAYS_FOLDER, Journal, read_events
from megatron_async_rl.errors import DataError


def written(tmp_path: Path, *group_ids: int) -> Path:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append(sample_returned(group_id) for group_id in group_ids)
    journal.close()
    return tmp_path / "journal.sqlite"


def check(events: list[AnyEvent], group_ids: list[int]) -> None:
    assert [event.group_id for event in events] == group_ids
    for event in events:
        assert isinstance(event, SampleReturned) and event.sample.text == f"text {event.group_id}"
        expected = sample_returned(event.group_id).sample
        assert np.array_equal(event.sample.ids, expected.ids) and np.array_equal(
            event.sample.versions, expected.versions
        )
        assert np.array_equal(event.sample.logprobs, expected.logprobs)


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.with_name(ARRAYS_FOLDER).iterdir())


def test_arrays_are_read_back_now_and_after_restarts(tmp_path: Path) -> None:
    path = written(tmp_path, 1, 2)
    written(tmp_path, 3)
    check(list(read_events(path)), [1, 2, 3])
    assert files(path) == ["000001.bin", "000002.bin"]
    sizes = [file.stat().st_size for file in sorted(path.with_name(ARRAYS_FOLDER).iterdir())]
    # unused space is released
    assert sizes[0] < 2.1 * 8 * NUM_TOKENS and sizes[1] < 1.1 * 8 * NUM_TOKENS


def test_file_is_removed_with_its_last_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # each file holds two groups
    monkeypatch.setattr(array_store, "SEGMENT_BYTES", 2 * 8 * NUM_TOKENS + 1000)
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    journal.append(sample_returned(group_id) for group_id in range(5))
    journal.flush().result(60)
    assert files(path) == ["000001.bin", "000002.bin", "000003.bin"]
    journal.prune([0, 2])
    journal.flush().result(60)
    assert len(files(path)) == 3
    reading = journal.events()
    check([next(reading)], [1])
    journal.prune([1, 3])
    journal.flush().result(60)
    assert files(path) == ["000003.bin"]
    check(list(reading), [3, 4])  # a reader that has started reads to the end
    journal.close()
    journal = Journal(path)  # learns from its rows which files are needed
    journal.append([sample_returned(9)])
    journal.prune([4])
    journal.close()
    assert files(path) == ["000004.bin"]
    check(list(read_events(path)), [9])


def test_arrays_without_a_row_are_removed_at_restart(tmp_path: Path) -> None:
    path = written(tmp_path, 1)
    (path.with_name(ARRAYS_FOLDER) / "000007.bin").write_bytes(b"of a commit that never came")
    written(tmp_path, 2)
    assert files(path) == ["000001.bin", "000002.bin"]
    check(list(read_events(path)), [1, 2])


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_arrays_raise_an_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path, 1, 2)
    file = path.with_name(ARRAYS_FOLDER) / "000001.bin"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(DataError, match=r"000001\.bin is missing or damaged .*--from-scratch"):
        list(read_events(path))


@pytest.mark.parametrize("refused", ["posix_fallocate", "pwritev", "fdatasync"])
def test_full_disk_delays_arrays_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal_module, "RETRY_S", 0.05)
    monkeypatch.setattr(array_store, "SEGMENT_BYTES", 2 * 8 * NUM_TOKENS + 1000)
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    with monkeypatch.context() as full:
        full.setattr(array_store.os, refused, refuse)
        journal.append(sample_returned(group_id) for group_id in range(5))
        waiter = journal.flush()
        with pytest.raises(TimeoutError):
            waiter.result(0.5)
        while not journal.error:  # on a machine that is slower still
            time.sleep(0.01)
        assert "No space left" in journal.error and not waiter.done()
    waiter.result(60)
    assert journal.error == ""
    check(list(journal.events()), [0, 1, 2, 3, 4])
    journal.close()


def test_flushed_arrays_survive_a_kill(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from megatron_async_rl.controller.journal.journal import Journal
        from journal_builders import sample_returned
        journal = Journal(Path(sys.argv[1]))
        for number in range(10**9):
            journal.append([sample_returned(number)])
            if number % 20 == 19:
                journal.flush().result(30)
                print(number, flush=True)
        """
    )
    path = tmp_path / "journal.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=python_environment(),
    ) as child:
        assert child.stdout
        told = [int(child.stdout.readline()) for _ in range(5)]
        os.kill(child.pid, signal.SIGKILL)
    events = list(read_events(path))
    assert len(events) > told[-1]
    check(events, list(range(len(events))))
