"""python -m megatron_async_rl.controller RUN_DIR: the controller of the run with that folder."""

import asyncio
import gc
import sys
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
    run_log = RunLog(run_dir, settings)
    journal = Journal(run_dir / JOURNAL_FILE)
    try:
        longest_array = max(
            settings.model.context_tokens * settings.max_sequences,
            settings.monitor.mismatch_probe_samples * PROBE_TOKENS,
        )
        hub = Hub(run_dir, settings.run.host, longest_array)
        try:
            controller = Controller(settings, hub, run_log, journal)
            # no full garbage collection reads the dataset again: 0.1 s for 200,000 prompts
            gc.collect()
            gc.freeze()
            await controller.run()
        finally:
            hub.close()
    finally:
        journal.close()
        run_log.close()


if __name__ == "__main__":
    processes.main(lambda: asyncio.run(_run(Path(sys.argv[1]))))
