"""Checkpoints are saved in the background, and load in other parallel layouts.

A damaged checkpoint is detected, and the previous one is loaded instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT, SUPPORT
from tiny_model import make_model

from megatron_async_rl.storage import checkpoints


def ranks(count: int, *arguments: str) -> str:
    """Runs checkpoint_main.py in `count` ranks, which must succeed; returns their log."""
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes=1",
                f"--nproc-per-node={count}",
            ),
            *(
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=127.0.0.1:0",
                str(SUPPORT / "checkpoint_main.py"),
                *arguments,
            ),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, run_dir) with checkpoints of versions 2 and 4 from TP = 2; version 4 is damaged."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, run_dir = make_model(folder / "model", layers=4), folder / "run"
    run_dir.mkdir()
    ranks(2, str(model), str(run_dir), "save", "grpo", "2,1,1")
    newest = checkpoints.list_manifests(run_dir)[0]
    name = next(name for name in newest.files if name.endswith(".distcp"))
    path = run_dir / checkpoints.FOLDER / newest.folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return model, run_dir


def test_last_two_checkpoints_are_complete_when_reported(saved: tuple[Path, Path]) -> None:
    _, run_dir = saved
    assert json.loads((run_dir / "losses.json").read_text())["saved"] == [
        [2, "v000002"],
        [4, "v000004"],
    ]
    assert [manifest.version for manifest in checkpoints.list_manifests(run_dir)] == [4, 2]


LAYOUTS = {2: ["2,1,1", "1,2,1", "1,2,2", "1,1,1"], 1: ["1,1,1"]}  # TP, PP, VPP by ranks


@pytest.fixture(scope="module")
def logs(saved: tuple[Path, Path]) -> dict[int, str]:
    """Loads in all layouts; returns the log of each number of ranks."""
    return {
        count: ranks(count, *map(str, saved), "load", "grpo", *layouts)
        for count, layouts in LAYOUTS.items()
    }


@pytest.mark.parametrize("count", LAYOUTS)
def test_damaged_checkpoint_is_reported_at_each_load(logs: dict[int, str], count: int) -> None:
    """By the one rank that reads the file."""
    for text in ("is damaged", "does not match its digest"):
        assert logs[count].count(text) == len(LAYOUTS[count])


@pytest.mark.parametrize(
    ("count", "layout"), [(count, layout) for count in LAYOUTS for layout in LAYOUTS[count]]
)
def test_previous_checkpoint_of_a_damaged_one_resumes_identically(
    saved: tuple[Path, Path], logs: dict[int, str], count: int, layout: str
) -> None:
    """Weights, Adam's moments and step count are restored: losses and gradient norms agree."""
    _, run_dir = saved
    name = f"loaded-{layout.replace(',', '-')}-{count}.json"
    loaded = json.loads((run_dir / name).read_text())
    assert loaded["version"] == 2
    expected = json.loads((run_dir / "losses.json").read_text())["losses"]
    exact = (count, layout) == (2, "2,1,1")  # as it was saved
    assert loaded["losses"] == (expected if exact else pytest.approx(expected, rel=2e-3, abs=2e-4))


def test_interleaved_pipeline_checkpoint_loads_into_one_rank(tmp_path: Path) -> None:
    """For the policy and the critic."""
    model, run_dir = make_model(tmp_path / "model", layers=4), tmp_path / "run"
    run_dir.mkdir()
    ranks(2, str(model), str(run_dir), "save", "gae", "1,2,2")
    (run_dir / checkpoints.FOLDER / "v000004").rename(run_dir / checkpoints.FOLDER / "gone")
    ranks(1, str(model), str(run_dir), "load", "gae", "1,1,1")
    loaded = json.loads((run_dir / "loaded-1-1-1-1.json").read_text())
    assert loaded["version"] == 2
    expected = json.loads((run_dir / "losses.json").read_text())["losses"]
    assert loaded["losses"] == pytest.approx(expected, rel=2e-3, abs=2e-4)
