"""`python -m megatron_async_rl.node RUN_DIR NAME`: runs one host's trainer ranks."""

import sys
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.config import load
from megatron_async_rl.node.node import Node


def _run(run_dir: Path, name: str) -> None:
    Node(load.load(run_dir / "config.yaml"), run_dir, name).run()


if __name__ == "__main__":
    processes.main(lambda: _run(Path(sys.argv[1]), sys.argv[2]))
