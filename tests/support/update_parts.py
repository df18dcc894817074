"""A configuration and the worker's end of its link, for tests of weight updates at a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_model import CPU_ENGINE

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.protocol.messages import Message

NEW_TOKENS = 140


def make_config(model: Path, run_dir: Path, **weights: Any) -> Config:
    return configuration.from_tree(
        {
            "run": {"dir": str(run_dir), "steps": 1},
            "model": {"path": str(model), "context_tokens": 240},
            "data": {"train": "unused"},
            "rollout": {"max_new_tokens": NEW_TOKENS},
            "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
            "weights": weights,
            "sglang": CPU_ENGINE,
        }
    )


@dataclass
class Sent:
    """Replaces the worker's link to the controller: keeps the messages that an update sends."""

    messages: list[Message] = field(default_factory=list)

    async def send(self, message: Message) -> None:
        self.messages.append(message)
