"""Turns rewards into advantages, one per sample.

With gamma = lambda = 1 and no critic, all tokens of a sample have the same advantage. With a critic
(gae) the shaped reward is sent instead, and trainer/algorithms/gae.py computes the advantages.

The reward r is shaped first: s = clip(((r - 0.5) * 2 - bias) * scale), less the overlong penalty.
Then, for sample i of a group of G samples with shaped rewards s (arXiv numbers at the right):

    grpo           (s_i - mean s) / (std s + GROUP_EPS), std biased    DeepSeekMath, 2402.03300
                   s_i itself with group_normalize = false             AReaL, 2505.24298
    dr_grpo        s_i - mean s                                        Dr. GRPO, 2503.20783
    rloo           s_i - mean of the other samples                     2402.14740
                     = G / (G - 1) (s_i - mean s)
    reinforce_pp   s_i, normalized over the batch                      REINFORCE++, 2501.03262

With batch_normalize (always for reinforce_pp) the result is (A - mean) / (std + BATCH_EPS) over all
generated tokens of the batch, std biased. All computations are in float64.
"""

from __future__ import annotations

import numpy as np

from megatron_async_rl.config.algorithm import AlgorithmConfig

GROUP_EPS = 1e-6  # added to a group's standard deviation
BATCH_EPS = 1e-5  # added outside the square root, as AReaL does


def sample_advantages(
    rewards_GS: np.ndarray,
    tokens_GS: np.ndarray,
    algorithm: AlgorithmConfig,
    max_new_tokens: int | None = None,
) -> np.ndarray:
    """Returns the advantages of one batch, [groups, samples] like both inputs, float64.

    `tokens_GS`: generated tokens per sample. `max_new_tokens`: limit per sample; only the overlong
    penalty needs it. Raises ValueError if it is missing then.
    """
    shaped_GS = shaped_rewards(rewards_GS, algorithm)
    if algorithm.reward_shaping.overlong_buffer_tokens:
        if max_new_tokens is None:
            raise ValueError("the overlong penalty needs max_new_tokens")
        shaped_GS = shaped_GS - algorithm.reward_shaping.overlong_penalty * overlong_share(
            tokens_GS, max_new_tokens, algorithm.reward_shaping.overlong_buffer_tokens
        )
    advantages_GS = _BASELINES[algorithm.advantage.estimator](shaped_GS, algorithm)
    if algorithm.advantage.estimator == "gae":
        return advantages_GS  # shaped rewards
    if algorithm.advantage.batch_normalize or algorithm.advantage.estimator == "reinforce_pp":
        advantages_GS = batch_normalized(advantages_GS, tokens_GS)
    return advantages_GS


def shaped_rewards(rewards_GS: np.ndarray, algorithm: AlgorithmConfig) -> np.ndarray:
    shaped_GS = (
        (np.asarray(rewards_GS, np.float64) - 0.5) * 2 - algorithm.reward_shaping.bias
    ) * algorithm.reward_shaping.scale
    if algorithm.reward_shaping.clip is not None:
        shaped_GS = shaped_GS.clip(-algorithm.reward_shaping.clip, algorithm.reward_shaping.clip)
    return shaped_GS


def overlong_share(tokens_GS: np.ndarray, max_new_tokens: int, buffer: int) -> np.ndarray:
    """Returns DAPO's soft overlong punishment: 0 before the buffer, rising to 1 at its end.

    Source: arXiv 2503.14476, eq. 13.
    """
    return ((np.asarray(tokens_GS, np.float64) - (max_new_tokens - buffer)) / buffer).clip(0.0, 1.0)


def _grpo(shaped_GS: np.ndarray, algorithm: AlgorithmConfig) -> np.ndarray:
    if not algorithm.advantage.group_normalize:
        return shaped_GS
    centered_GS = _dr_grpo(shaped_GS, algorithm)
    return centered_GS / (centered_GS.std(axis=1, keepdims=True) + GROUP_EPS)


def _dr_grpo(shaped_GS: np.ndarray, algorithm: AlgorithmConfig) -> np.ndarray:
    return shaped_GS - shaped_GS.mean(axis=1, keepdims=True)


def _rloo(shaped_GS: np.ndarray, algorithm: AlgorithmConfig) -> np.ndarray:
    size = shaped_GS.shape[1]
    return (
        _dr_grpo(shaped_GS, algorithm) * (size / (size - 1))
        if size > 1
        else np.zeros_like(shaped_GS)
    )


def _as_shaped(shaped_GS: np.ndarray, algorithm: AlgorithmConfig) -> np.ndarray:
    return shaped_GS


_BASELINES = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "reinforce_pp": _as_shaped,
    "gae": _as_shaped,
}


def batch_normalized(advantages_GS: np.ndarray, tokens_GS: np.ndarray) -> np.ndarray:
    """Normalizes to mean 0 and variance 1 over tokens; returns the input if there are no tokens."""
    num_tokens = tokens_GS.sum()
    if not num_tokens:
        return advantages_GS
    mean = (advantages_GS * tokens_GS).sum() / num_tokens
    variance = ((advantages_GS - mean) ** 2 * tokens_GS).sum() / num_tokens
    return (advantages_GS - mean) / (np.sqrt(variance) + BATCH_EPS)
