"""`python -m megatron_async_rl.rollout RUN_DIR NAME`: one rollout worker and its SGLang server."""

import asyncio
import sys
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.config import load
from megatron_async_rl.protocol.transport import Link
from megatron_async_rl.rollout.engine_process import Server
from megatron_async_rl.rollout.worker import RolloutWorker
from megatron_async_rl.rollout.workflow import load_workflow


async def _serve(run_dir: Path, name: str) -> None:
    settings = load.load(run_dir / "config.yaml")
    workflow = load_workflow(settings.rollout.workflow)  # before the server: it takes long to start
    server = Server(settings, run_dir, name)
    try:
        await server.start()
        link = Link(run_dir)
        try:
            await RolloutWorker(name, settings, link, server, workflow).run()
        finally:
            link.close()
    finally:
        await server.stop()


if __name__ == "__main__":
    processes.main(lambda: asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2])))
