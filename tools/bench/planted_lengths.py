"""A workflow and a reward for benchmarks of whole runs: response lengths are planted.

Lengths are log-normal, so a batch has the long tail of reasoning models, and depend on prompt and
sample alone: every row of a benchmark generates the same lengths. The reward is a coin. From the
environment:

    PLANTED_MEAN, PLANTED_MAX   mean and limit of the lengths in tokens
    PLANTED_SIGMA               of their logarithm: 1; 0 gives all the mean
    PLANTED_ENDS                a file to which the time of each sample's end is appended, in s
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections import Counter
from typing import Any

import numpy as np

from megatron_async_rl.protocol.types import Prompt, Sample, join_segments
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.workflow import Policy

ENDS = os.environ.get("PLANTED_ENDS")
_ends_fd = os.open(ENDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if ENDS else -1


def length(prompt: str, index: int) -> int:
    """Returns the planted length of the `index`-th sample of a prompt, in tokens."""
    mean = float(os.environ.get("PLANTED_MEAN", "600"))
    most = int(os.environ.get("PLANTED_MAX", "2048"))
    sigma = float(os.environ.get("PLANTED_SIGMA", "1"))
    digest = hashlib.sha256(f"{prompt} {index}".encode()).digest()
    normal = np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal()
    tokens = np.exp(np.log(mean) - sigma**2 / 2 + sigma * normal)
    return int(np.clip(np.rint(tokens), 16, most))


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
        if ENDS:
            os.write(_ends_fd, f"{time.monotonic()}\n".encode())
        return join_segments(prompt.ids, turn.segments, turn.stop, str(index % 2))


def coin(prompt: str, response: str, row: dict[str, Any]) -> float:
    return float(response == "1")
