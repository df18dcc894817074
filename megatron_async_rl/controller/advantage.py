"""Rewards to advantages: shaped, centered in their group, normalised over the batch (facts: AReaL's order)."""

from __future__ import annotations

import numpy as np

from megatron_async_rl.config import AlgorithmConfig

GROUP_EPS = 1e-6  # added to a group's standard deviation
BATCH_EPS = 1e-5  # added outside the square root, as AReaL does


def sample_advantages(rewards_GS: np.ndarray, tokens_GS: np.ndarray, algorithm: AlgorithmConfig) -> np.ndarray:
    """One advantage per sample; with gamma = lambda = 1 and no critic, each of its tokens has the same.

    rewards_GS: [groups, samples] of one batch; tokens_GS: generated tokens of each, the weights of batch_normalize.
    Returns [groups, samples] float64.
    """
    advantages_GS = ((np.asarray(rewards_GS, np.float64) - 0.5) * 2 - algorithm.reward_bias) * algorithm.reward_scale
    if algorithm.group_normalize:
        centered_GS = advantages_GS - advantages_GS.mean(axis=1, keepdims=True)
        advantages_GS = centered_GS / (centered_GS.std(axis=1, keepdims=True) + GROUP_EPS)
    if algorithm.batch_normalize and (num_tokens := tokens_GS.sum()):
        mean = (advantages_GS * tokens_GS).sum() / num_tokens
        variance = ((advantages_GS - mean) ** 2 * tokens_GS).sum() / num_tokens  # biased
        advantages_GS = (advantages_GS - mean) / (np.sqrt(variance) + BATCH_EPS)
    return advantages_GS
