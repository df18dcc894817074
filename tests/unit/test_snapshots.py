"""Weight snapshots are complete or absent whenever a writer is killed; two are kept."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from snapshot_builders import part_tensors, write_part
from tiny_model import make_model

from megatron_async_rl.errors import DataError
from megatron_async_rl.storage import snapshots
from megatron_async_rl.storage.snapshots import SnapshotManifest
from megatron_async_rl.weights.bucket import plan_buckets
from megatron_async_rl.weights.disk import SnapshotWriter
from megatron_async_rl.weights.reshard import TensorInfo


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


def write(run_dir: Path, version: int, model: Path) -> snapshots.Snapshot:
    """Writes and commits a snapshot like two weight sources and the controller."""
    partial = snapshots.begin(run_dir, version)
    files = [entry for part in range(2) for entry in write_part(partial, version, part)]
    return snapshots.commit(
        partial, files, SnapshotManifest(version, {}, 1, "sha256", {"0:x": "ab"}), model
    )


def test_snapshot_is_readable_by_transformers_and_safetensors(tmp_path: Path, model: Path) -> None:
    snapshot = write(tmp_path, 3, model)
    assert (
        snapshot.path == tmp_path / "weights" / "v000003.0"
        and snapshots.find_damage(snapshot) == ""
    )
    assert json.loads((snapshot.path / "config.json").read_text()) == json.loads(
        (model / "config.json").read_text()
    )
    index = json.loads((snapshot.path / "model.safetensors.index.json").read_text())["weight_map"]
    want = dict(part_tensors(3, 0) + part_tensors(3, 1))
    assert index.keys() == want.keys() and len(set(index.values())) > 6
    for name, file in index.items():
        assert torch.equal(load_file(snapshot.path / file)[name], want[name])
    assert snapshots.list_snapshots(tmp_path) == [snapshot]


def test_third_snapshot_removes_the_first_unless_in_use(tmp_path: Path, model: Path) -> None:
    first = write(tmp_path, 1, model)
    for version in (2, 3):
        write(tmp_path, version, model)
        snapshots.prune(tmp_path, in_use={first.path})
    assert [found.version for found in snapshots.list_snapshots(tmp_path)] == [3, 2, 1]
    snapshots.prune(tmp_path)
    assert [found.version for found in snapshots.list_snapshots(tmp_path)] == [3, 2]
    again = write(tmp_path, 3, model)
    snapshots.prune(tmp_path)
    assert [found.path.name for found in snapshots.list_snapshots(tmp_path)] == [
        "v000003.1",
        "v000002.0",
    ]
    assert snapshots.find_damage(again) == ""
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        "v000002.0",
        "v000003.1",
    ]


def test_held_snapshot_survives_pruning(tmp_path: Path, model: Path) -> None:
    first = write(tmp_path, 1, model)
    held = snapshots.hold(first, "rollout-0")
    assert held
    for version in (2, 3):
        write(tmp_path, version, model)
        snapshots.prune(tmp_path)
    assert not first.path.exists() and snapshots.hold(first, "rollout-1") is None
    assert snapshots.find_damage(msgspec.structs.replace(first, path=held)) == ""
    # no process uses it
    assert [found.version for found in snapshots.list_snapshots(tmp_path)] == [
        3,
        2,
    ]
    snapshots.release(first, "rollout-0")
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        "v000002.0",
        "v000003.0",
    ]


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damaged_file_is_detected_and_named(tmp_path: Path, model: Path, harm: str) -> None:
    snapshot = write(tmp_path, 1, model)
    path = snapshot.path / "model-00002-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(raw if harm == "flip" else raw[:-9])
    assert path.name in snapshots.find_damage(snapshot)


def test_incomplete_snapshot_is_not_committed(tmp_path: Path, model: Path) -> None:
    partial = snapshots.begin(tmp_path, 1)
    files = write_part(partial, 1, 0)
    manifest = SnapshotManifest(1, {}, 1, "sha256", {})
    with pytest.raises(DataError, match="bytes that were sent"):
        snapshots.commit(partial, [msgspec.structs.replace(files[0], num_bytes=7)], manifest, model)
    with pytest.raises(DataError, match=r"holds 0\.0, which"):
        snapshots.commit(
            partial, [*files, msgspec.structs.replace(files[1], tensors=["0.0"])], manifest, model
        )
    assert snapshots.list_snapshots(tmp_path) == []


def test_full_disk_is_reported_after_the_gather_completes(tmp_path: Path) -> None:
    named = iter(part_tensors(1, 0))
    plan = plan_buckets(
        [TensorInfo(n, tuple(t.shape), t.dtype, n) for n, t in part_tensors(1, 0)], 20_000
    )
    writer = SnapshotWriter(tmp_path / "gone", 0)
    writer.write(plan, named, torch.device("cpu"), None)
    assert "gone" in writer.error and next(named, None) is None


def test_writer_that_is_stopped_completes_the_gather_and_writes_no_more(tmp_path: Path) -> None:
    """The run ends: other ranks gather with this one, and the trainer must save soon."""
    named = part_tensors(1, 0)
    plan = plan_buckets([TensorInfo(n, tuple(t.shape), t.dtype, n) for n, t in named], 20_000)
    writer = SnapshotWriter(tmp_path, 0)

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for number, tensor in enumerate(named):
            if number == len(named) // 2:
                writer.stop("the run ends")
            yield tensor

    tensors = gathered()
    writer.write(plan, tensors, torch.device("cpu"), None)
    assert writer.error == "the run ends" and next(tensors, None) is None
    assert len(writer.files) < len(plan)


def _write_until_killed(run_dir: Path, model: Path) -> None:
    torch.set_num_threads(1)
    for version in range(snapshots.list_snapshots(run_dir)[0].version + 1, 10_000):
        write(run_dir, version, model)
        snapshots.prune(run_dir)


def test_kill_while_writing_leaves_only_complete_folders(tmp_path: Path, model: Path) -> None:
    """Kills a writer at ten instants while a reader lists and reads all the time."""
    write(tmp_path, 1, model)
    newest = 1
    for round_ in range(10):
        writer = multiprocessing.get_context("fork").Process(
            target=_write_until_killed, args=(tmp_path, model)
        )
        writer.start()
        assert writer.pid is not None
        deadline = time.monotonic() + 60

        def under_way(
            target: int = newest + 1 + round_ % 2, files: int = 1 + 2 * (round_ % 5)
        ) -> bool:
            """True while a version from `target` on has so many files and is not complete."""
            for partial in (tmp_path / "weights").glob(".v*.partial"):
                with contextlib.suppress(FileNotFoundError):  # it has just been renamed
                    if int(partial.name[2:8]) >= target and len(list(partial.iterdir())) >= files:
                        return True
            return False

        while not under_way():
            assert snapshots.list_snapshots(tmp_path) and time.monotonic() < deadline
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = snapshots.list_snapshots(tmp_path)
        assert 1 <= len(found) <= 3  # three if killed before pruning
        assert [snapshots.find_damage(snapshot) for snapshot in found] == [""] * len(found)
        assert found[0].version >= newest + round_ % 2
        newest = found[0].version


def test_kill_at_any_commit_step_leaves_the_old_version(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulates a power cut before the n-th fsync or rename of the second version, for every n."""
    write(tmp_path, 1, model)
    real = {name: getattr(os, name) for name in ("fsync",)}
    rename = Path.rename
    outcomes = []
    for limit in range(100):
        steps = 0

        def step(limit: int = limit) -> None:
            nonlocal steps
            steps += 1
            if steps > limit:
                raise KeyboardInterrupt  # no code of ours catches it

        monkeypatch.setattr(os, "fsync", lambda fd, step=step: (step(), real["fsync"](fd)))
        monkeypatch.setattr(
            Path, "rename", lambda self, to, step=step: (step(), rename(self, to))[1]
        )
        try:
            write(tmp_path, 2, model)
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            monkeypatch.undo()
        found = [snapshot.version for snapshot in snapshots.list_snapshots(tmp_path)]
        outcomes.append(found)
        assert found in ([1], [2, 1])
        assert all(
            not snapshots.find_damage(snapshot) for snapshot in snapshots.list_snapshots(tmp_path)
        )
        if found == [2, 1]:
            shutil.rmtree(snapshots.list_snapshots(tmp_path)[0].path)
    # the rename is the last step but one
    assert outcomes.count([1]) > 10 and outcomes[-1] == [
        2,
        1,
    ]
