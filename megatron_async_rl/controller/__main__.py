"""python -m megatron_async_rl.controller RUN_DIR: the controller of the run with that folder."""

import asyncio
import gc
import sys
from contextlib import closing
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.config import load
from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, Journal
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.protocol.transport import Hub
from megatron_async_rl.protocol.types import PROBE_TOKENS


async def _run(run_dir: Path) -> None:
    settings = load.load(run_dir / "config.yaml")
    longest_array = max(
        settings.model.context_tokens * settings.max_sequences,
        settings.monitor.mismatch_probe_samples * PROBE_TOKENS,
    )
    with (
        closing(RunLog(run_dir, settings)) as run_log,
        closing(Journal(run_dir / JOURNAL_FILE)) as journal,
        closing(Hub(run_dir, settings.run.host, longest_array)) as hub,
    ):
        controller = Controller(settings, hub, run_log, journal)
        # full garbage collections then skip the dataset: 0.1 s for 200,000 prompts
        gc.collect()
        gc.freeze()
        await controller.run()


if __name__ == "__main__":
    processes.main(lambda: asyncio.run(_run(Path(sys.argv[1]))))
