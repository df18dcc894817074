"""`python -m megatron_async_rl.rollout RUN_DIR NAME`: one rollout worker and its SGLang server."""

import asyncio
import sys
from pathlib import Path

from megatron_async_rl import hooks, processes
from megatron_async_rl.config import load
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.rollout.agents.workflow import AgentWorkflow
from megatron_async_rl.rollout.engine_process import SGLangServer
from megatron_async_rl.rollout.worker import RolloutWorker
from megatron_async_rl.rollout.workflow import Workflow


async def _serve(run_dir: Path, name: str) -> None:
    config = load.load(run_dir / "config.yaml")
    # before the server, which starts slowly
    rollout = config.rollout
    workflow: Workflow
    if config.has_agent:
        workflow = AgentWorkflow(config, run_dir / "logs" / f"{name}.agents.log")
    else:
        workflow = hooks.workflow(rollout.workflow, rollout.workflow_options)
    server = SGLangServer(config, run_dir, name)
    try:
        await server.start()
        link = Link(run_dir)
        try:
            await RolloutWorker(name, config, link, server, workflow).run()
        finally:
            link.close()
    finally:
        if isinstance(workflow, AgentWorkflow):
            await workflow.stop()
        await server.stop()


if __name__ == "__main__":
    processes.main(lambda: asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2])))
