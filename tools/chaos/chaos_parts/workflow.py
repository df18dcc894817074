"""The workflow of a chaos job, with a poison prompt.

Set as rollout.workflow: chaos_parts.workflow:Poisoned.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_async_rl.protocol.types import Prompt, Sample
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.workflow import Policy
from megatron_async_rl.rollout.workflows.single_turn import SingleTurn

INVALID_TOKEN_ID = 1 << 20


class Poisoned(SingleTurn):
    """Single turns; the first prompt that sees the flag `poison` is a poison prompt from then on.

    A poison prompt holds a token id beyond the vocabulary.
    """

    def __init__(self) -> None:
        self._folder = Path(os.environ["CHAOS_FOLDER"])

    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        poisoned = self._folder / "poisoned"
        if (self._folder / "poison").exists():
            poisoned.write_text(prompt.prompt_id)
            (self._folder / "poison").unlink(missing_ok=True)
        if poisoned.exists() and poisoned.read_text() == prompt.prompt_id:
            await policy.generate([*prompt.ids.tolist(), INVALID_TOKEN_ID], sampling)
        return await super().run(prompt, policy, sampling)
