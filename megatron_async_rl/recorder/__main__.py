"""`python -m megatron_async_rl.recorder RUN_DIR`: writes the batches of a run without a trainer."""

import sys
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.config import load
from megatron_async_rl.recorder.recorder import Recorder


def _record(run_dir: Path) -> None:
    Recorder(load.load(run_dir / "config.yaml"), run_dir).run()


if __name__ == "__main__":
    processes.main(lambda: _record(Path(sys.argv[1])))
