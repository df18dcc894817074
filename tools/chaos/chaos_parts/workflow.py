"""`rollout.workflow: chaos_parts.workflow:Poisoned`: single turns, of which some kill or upset the server while a flag stands."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_async_rl.protocol.types import Prompt, Sample
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.workflow import Policy, SingleTurn

BEYOND_THE_VOCABULARY = 1 << 20


class Poisoned(SingleTurn):
    """The first prompt that comes while the flag `poison` stands is poison from then on: a token that the model lacks."""

    def __init__(self) -> None:
        self._folder = Path(os.environ["CHAOS_FOLDER"])

    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        poisoned = self._folder / "poisoned"
        if (self._folder / "poison").exists():
            poisoned.write_text(prompt.prompt_id)
            (self._folder / "poison").unlink(missing_ok=True)
        if poisoned.exists() and poisoned.read_text() == prompt.prompt_id:
            await policy.generate([*prompt.ids.tolist(), BEYOND_THE_VOCABULARY], sampling)
        return await super().run(prompt, policy, sampling)
