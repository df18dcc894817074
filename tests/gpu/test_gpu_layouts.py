"""Layouts over NCCL match TP1 PP1 CP1, on the GPUs of one host.

In float32, and in bfloat16 within its rounding error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from gpu_layouts_main import LAYOUTS
from paths import ROOT, SUPPORT

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # relative to the largest entry of a gradient


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if GPUS < 2:
        pytest.skip("needs two GPUs")
    out = tmp_path_factory.mktemp("layouts") / "figures.json"
    ranks = 4 if GPUS >= 4 else 2
    environment = os.environ | {
        "TORCHDYNAMO_DISABLE": "1",  # tests/unit/test_fused.py covers the compiled kernels
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    done = subprocess.run(
        [*command, str(SUPPORT / "gpu_layouts_main.py"), str(out), str(ranks)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradients_match_the_single_rank_layout(
    name: str, figures: dict[str, Any]
) -> None:
    if name not in figures:
        pytest.skip(f"needs {LAYOUTS[name][3]} GPUs")
    got, tolerance = figures[name], TOLERANCE[LAYOUTS[name][1]]
    assert got["tokens"][0] == got["tokens"][1] > 0
    assert got["loss"][0] == pytest.approx(
        got["loss"][1], rel=tolerance, abs=tolerance * got["tokens"][1]
    )
    assert got["largest"] > 0
    wrong = [(tensor, d) for tensor, d in got["differences"] if not d <= tolerance]
    assert not wrong
