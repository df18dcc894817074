"""`python -m megatron_async_rl.recorder RUN_DIR`: writes the batches of a run without a trainer."""

import sys
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.recorder import recorder

if __name__ == "__main__":
    processes.main(lambda: recorder.run(Path(sys.argv[1])))
