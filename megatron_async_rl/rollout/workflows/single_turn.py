"""One response per prompt."""

from __future__ import annotations

from megatron_async_rl.protocol.types import Prompt, Sample, join_segments
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.workflow import Policy


class SingleTurn:
    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        completion = await policy.generate(prompt.ids.tolist(), sampling)
        text = policy.tokenizer.decode(completion.ids)
        return join_segments(prompt.ids, completion.segments, completion.stop, text)
