"""Runs a controller over its real socket inside a test, with a worker's end of the connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, TypeVar

from config_builders import config_tree

from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, Journal
from megatron_async_rl.data.tokenizer import fingerprint
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.protocol.hub import Hub
from megatron_async_rl.protocol.link import Link, with_versions
from megatron_async_rl.protocol.messages import Hello, Message

TIMEOUT_S = 60.0


Closes = TypeVar("Closes", Journal, RunLog, Hub, Link)


def controller_config(model_and_dataset: tuple[Path, Path], run_dir: Path) -> Config:
    model, train = model_and_dataset
    return load.from_tree(
        config_tree(
            run={"dir": str(run_dir), "steps": 5},
            model={"path": str(model), "context_tokens": 96},
            data={"train": str(train)},
            algorithm={"prompts_per_step": 2, "samples_per_prompt": 2},
        )
    )


def with_controller(
    model_and_dataset: tuple[Path, Path],
    run_dir: Path,
    test: Callable[[Controller, Link], Awaitable[None]],
) -> None:
    """Calls `test` with a running controller and a worker's socket."""

    async def body() -> None:
        chosen = controller_config(model_and_dataset, run_dir)
        with contextlib.ExitStack() as opened:

            def closing(part: Closes) -> Closes:
                opened.callback(part.close)
                return part

            journal = closing(Journal(run_dir / JOURNAL_FILE))
            log = closing(RunLog(run_dir, chosen))
            hub = closing(Hub(run_dir, context_tokens=chosen.model.context_tokens))
            link = closing(Link(run_dir))
            controller = Controller(chosen, hub, log, journal)
            running = asyncio.create_task(controller.run())
            try:
                await asyncio.wait_for(test(controller, link), TIMEOUT_S)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    asyncio.run(body())


async def ask(link: Link, message: Message) -> Message:
    """Sends a message and returns the next one that arrives, without answering a Refused."""
    await link.send(message)
    return await link._receive()


def hello_of(
    model_and_dataset: tuple[Path, Path],
    role: Literal["rollout", "reward", "trainer"],
    name: str,
    **more: int,
) -> Hello:
    """Returns the Hello of a worker of this version that sees this model folder."""
    return with_versions(
        Hello(role, name, 1, capacity=4, tokenizer=fingerprint(model_and_dataset[0]), **more)
    )
