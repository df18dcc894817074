"""A workflow and a reward for benchmarks of whole runs: response lengths are planted.

Lengths are log-normal (sigma 1), so a batch has the long tail of reasoning models, and depend on
prompt and sample alone: every row of a benchmark generates the same lengths. PLANTED_MEAN and
PLANTED_MAX (environment) are their mean and limit in tokens. The reward is a coin.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from typing import Any

import numpy as np

from megatron_async_rl.protocol.types import Prompt, Sample, join_segments
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.workflow import Policy

SIGMA = 1.0


def length(prompt: str, index: int) -> int:
    """Returns the planted length of the `index`-th sample of a prompt, in tokens."""
    mean = float(os.environ.get("PLANTED_MEAN", "600"))
    most = int(os.environ.get("PLANTED_MAX", "2048"))
    digest = hashlib.sha256(f"{prompt} {index}".encode()).digest()
    normal = np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal()
    tokens = np.exp(np.log(mean) - SIGMA**2 / 2 + SIGMA * normal)
    return int(np.clip(tokens, 16, most))


class PlantedLengths:
    def __init__(self) -> None:
        self._num_samples: Counter[str] = Counter()

    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        self._num_samples[prompt.prompt_id] += 1
        index = self._num_samples[prompt.prompt_id]
        planted = length(prompt.prompt_id, index)
        turn = await policy.generate(
            prompt.ids.tolist(),
            dataclasses.replace(sampling, max_new_tokens=planted, stop_token_ids=[]),
        )
        return join_segments(prompt.ids, turn.segments, turn.stop, str(index % 2))


def coin(prompt: str, response: str, row: dict[str, Any]) -> float:
    return float(response == "1")
