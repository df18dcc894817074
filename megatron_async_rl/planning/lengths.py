"""Lengths of samples for a simulation: a capped log-normal, or those that a run has trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIGMA = 1.0  # of the log-normal: a long tail, as reasoning models have
NUM_DRAWN = 1 << 16  # the solution for the mean uses this many draws


@dataclass(frozen=True)
class Lengths:
    """Samples are drawn from these pairs, with replacement."""

    prompt_tokens: np.ndarray  # [n] int64
    response_tokens: np.ndarray  # [n] int64

    @property
    def mean_response(self) -> float:
        return float(self.response_tokens.mean())

    @property
    def mean_tokens(self) -> float:
        return float((self.prompt_tokens + self.response_tokens).mean())

    @property
    def mean_context(self) -> float:
        """Mean tokens of a running sample at a random moment: a long one runs longer."""
        response = self.response_tokens.astype(float)
        age = (response**2).mean() / (2 * response.mean())
        prompt = (self.prompt_tokens * response).mean() / response.mean()
        return float(prompt + age)


def log_normal(mean: float, longest: int, prompt_tokens: int) -> Lengths:
    """Returns lengths with the given mean after capping; at most 0.95 of `longest`."""
    normal = np.random.default_rng(0).standard_normal(NUM_DRAWN)
    mean = min(mean, 0.95 * longest)
    low, high = 0.0, float(np.log(1000 * longest))
    for _ in range(60):
        middle = (low + high) / 2
        capped_mean = np.minimum(np.exp(middle + SIGMA * normal), longest).mean()
        low, high = (middle, high) if capped_mean < mean else (low, middle)
    response = np.clip(np.exp(low + SIGMA * normal), 1, longest).astype(np.int64)
    return Lengths(np.full(NUM_DRAWN, prompt_tokens, np.int64), response)
