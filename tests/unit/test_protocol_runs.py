"""Runs whose processes and connections fail at any message end as they should (protocol_runs.py).

PROTOCOL_RUNS=200:400 pytest tests/unit/test_protocol_runs.py     other seeds
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from protocol_parts import STEPS, Wire
from protocol_runs import KilledJournal, ProtocolRun

from megatron_async_rl.protocol import messages as m
from megatron_async_rl.storage import checkpoints

FIRST, LAST = map(int, os.environ.get("PROTOCOL_RUNS", "0:8").split(":"))
SIGTERM_AT = 26  # messages of the ranks: after the second step, before any checkpoint
LIMIT_S = 400.0  # of a run with one loss; collectives and a stall end after 600 s
LOSSES = [
    ("Hello", 2), ("Welcome", 1), ("PublishOffer", 2), ("OpenGroup", 1), ("GroupOpened", 1),
    ("SendBuckets", 2), ("BucketsSent", 2), ("Published", 1), ("GetBatch", 1), ("GetBatch", 3),
    ("TrainBatch", 1), ("TrainBatch", 4), ("StepDone", 1), ("StepDone", 4), ("CheckpointSaved", 1),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_run_ends_trained_or_saved(
    model_and_dataset: tuple[Path, Path], tmp_path: Path, seed: int
) -> None:
    ProtocolRun(model_and_dataset, tmp_path, seed).run()


def run_without_faults(inputs: tuple[Path, Path], folder: Path, replicas: int) -> ProtocolRun:
    run = ProtocolRun(inputs, folder, 1, replicas)
    run.faults, run.sigterm_at = {}, -1
    return run


@pytest.mark.parametrize(("kind", "number"), LOSSES)
def test_message_that_is_lost_costs_minutes_and_no_process(
    model_and_dataset: tuple[Path, Path], tmp_path: Path, kind: str, number: int
) -> None:
    run = run_without_faults(model_and_dataset, tmp_path, replicas=2)
    run.lost = kind, number
    run.run()
    assert run.lost is None and run.now < LIMIT_S


@pytest.mark.parametrize("number", [2, 3])
def test_end_of_the_run_waits_for_a_report_that_is_lost(
    model_and_dataset: tuple[Path, Path], tmp_path: Path, number: int
) -> None:
    """Of the last checkpoint, or of its answer."""
    run = run_without_faults(model_and_dataset, tmp_path, replicas=1)
    run.lost = ("CheckpointSaved" if number == 2 else "CheckpointCommitted"), 2
    run.run()
    assert run.lost is None and run.now < LIMIT_S


def test_republish_that_is_lost_is_sent_again(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    run = ProtocolRun(model_and_dataset, tmp_path, 224, replicas=1)
    run.faults, run.sigterm_at, run.lost = {10: "server"}, -1, ("Republish", 1)
    run.run()
    assert run.lost is None and run.now < LIMIT_S


@pytest.mark.parametrize("kind", ["TrainBatch", "Shutdown", "StepDone", "CheckpointSaved"])
def test_trainer_saves_at_sigterm_in_spite_of_a_lost_message(
    model_and_dataset: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    """A leader that lost its share does not make the other one train alone."""
    run = run_without_faults(model_and_dataset, tmp_path, replicas=2)
    run.sigterm_at = SIGTERM_AT
    run.lost = kind, {"TrainBatch": 4, "StepDone": 2}.get(kind, 1)
    run.run()
    assert run.lost is None and run.was_preempted and run.must_save


class LossAtTheEnd(ProtocolRun):
    """The trainer is killed at the first message of this kind for the last version."""

    def __init__(self, inputs: tuple[Path, Path], folder: Path, kind: type[m.Message]) -> None:
        super().__init__(inputs, folder, 1, replicas=1)
        self.faults, self.sigterm_at = {}, -1
        self.kind: type[m.Message] | None = kind

    def is_lost(self, wire: Wire, message: object) -> bool:
        if self.kind and isinstance(message, self.kind) and getattr(message, "version", 0) == STEPS:
            self.at(0.05, self.lose_controller if self.kind is m.StepDone else self.lose_checkpoint)
            self.kind = None
        return super().is_lost(wire, message)

    def lose_controller(self) -> None:
        assert self.controller
        journal = self.controller.journal
        assert isinstance(journal, KilledJournal)
        journal.write(len(journal.held))
        self.crashed.set()
        self.restart_trainer()

    def lose_checkpoint(self) -> None:
        (self.folder / checkpoints.FOLDER / f"{checkpoints.folder_name(STEPS)}.json").unlink()
        self.restart_trainer()


@pytest.mark.parametrize("kind", [m.StepDone, m.CheckpointCommitted])
def test_last_version_that_is_lost_is_trained_and_saved_again(
    model_and_dataset: tuple[Path, Path], tmp_path: Path, kind: type[m.Message]
) -> None:
    """Before it is saved, controller and trainer are killed; after it, the checkpoint is lost."""
    run = LossAtTheEnd(model_and_dataset, tmp_path, kind)
    run.run()
    assert run.kind is None and run.incarnation == 1


def test_checkpoint_counts_although_an_older_one_cannot_be_removed(
    model_and_dataset: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def prune(run_dir: Path, keep: int) -> int:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(checkpoints, "prune", prune)
    run_without_faults(model_and_dataset, tmp_path, replicas=1).run()
    assert "older checkpoints are not removed" in caplog.text
    assert "is not usable" not in caplog.text
