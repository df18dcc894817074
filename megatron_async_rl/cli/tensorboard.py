"""`tensorboard`: serves the metrics of a run, with the TensorBoard of this Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.run_log import TENSORBOARD_DIR


def run(run_dir: Path, options: Sequence[str]) -> NoReturn:
    """Replaces this process by TensorBoard. Raises DataError if the run has no metrics."""
    folder = run_dir / TENSORBOARD_DIR
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; give the run.dir of a run")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), *options]
    os.execv(sys.executable, command)
