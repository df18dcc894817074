"""python -m megatron_async_rl.controller RUN_DIR: the controller of the run with that folder."""

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.config import load
from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, Journal
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.observability.status import STATUS_FILE
from megatron_async_rl.protocol.hub import Hub
from megatron_async_rl.protocol.types import PROBE_TOKENS

TOUCH_S = 2.0


async def _run(run_dir: Path) -> None:
    settings = load.load(run_dir / "config.yaml")
    longest_array = max(
        settings.model.context_tokens * settings.max_sequences,
        settings.monitor.mismatch_probe_samples * PROBE_TOKENS,
    )
    with ExitStack() as opened:
        # it replaces the status of an earlier start, which must not look new
        run_log = opened.enter_context(closing(RunLog(run_dir, settings)))
        with _shown_alive(run_dir / STATUS_FILE):
            journal = opened.enter_context(closing(Journal(run_dir / JOURNAL_FILE)))
            hub = opened.enter_context(closing(Hub(run_dir, settings.run.host, longest_array)))
            controller = Controller(settings, hub, run_log, journal)
        # no full garbage collection reads the dataset again: 0.1 s for 200,000 prompts
        gc.collect()
        gc.freeze()
        await controller.run()


@contextmanager
def _shown_alive(status: Path) -> Iterator[None]:
    """Touches status.json while the block reads the journal: minutes for millions of events.

    The launcher kills a controller whose file does not change.
    """
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(TOUCH_S):
            with suppress(OSError):
                os.utime(status)

    thread = threading.Thread(target=touch, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    processes.main(lambda: asyncio.run(_run(Path(sys.argv[1]))))
