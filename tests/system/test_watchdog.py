"""A run without progress ends with one error that says which process waits for which.

The stacks of all processes are in the logs of the run.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import psutil
from descendants import Descendants
from needs import needs_engine
from whole_runs import SHORT_ROLLOUT, make_run_inputs, start_run, wait_for_version

pytestmark = needs_engine


def test_stopped_processes_are_one_error_with_all_stacks(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = make_run_inputs(tmp_path).config(
        run_dir,
        run={"steps": 5000, "export_every": 0, "no_progress_timeout_s": 15},
        evaluation={"sets": {}},
        rollout=SHORT_ROLLOUT,
        megatron={"tensor_model_parallel_size": 1},
        checkpoint={"every": 0},
    )
    child = start_run(path)
    watch = Descendants(child.pid)
    try:
        wait_for_version(run_dir, 2, child=child)
        for process in watch.look():
            with contextlib.suppress(psutil.NoSuchProcess):
                if not {"controller", "trainer.torchrun"} & _words(process):
                    process.suspend()
        _, errors = child.communicate(timeout=180)
        assert child.returncode == 2
        said = re.search(
            r"error: nothing was generated or trained for (\d+) s "
            r"\(run.no_progress_timeout_s = 15\): (.*)",
            errors,
        )
        assert said and 15 <= int(said[1]) < 100, errors
        assert re.search(
            r"waited for the batch of version \d+ for \d+ s|the controller waits for the trainer",
            said[2],
        )
        assert re.search(
            r"rollout-0 \w+ at version \d+ with \d+ samples, last heard \d+ s ago", said[2]
        )
        assert re.search(r"reward-0 with \d+ score requests, last heard \d+ s ago", said[2])
        for name in ("controller", "rollout-0", "trainer", "reward-0"):
            assert "most recent call first" in (run_dir / "logs" / f"{name}.log").read_text(), name
        assert watch.left() == []
    finally:
        child.kill()
        child.communicate()


def _words(process: psutil.Process) -> set[str]:
    return {word.rpartition("megatron_async_rl.")[2] for word in process.cmdline()}
