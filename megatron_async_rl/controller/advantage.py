"""Turns rewards into advantages, one per sample or per turn.

Without a critic, all tokens of a sample, or of a turn, have the same advantage. With a critic (gae,
turn_gae) the shaped rewards are sent instead, and trainer/algorithms/gae.py computes the
advantages.

The reward r is shaped first: s = clip(((r - 0.5) * 2 - bias) * scale), less the overlong penalty.
Then, for sample i of a group of G samples with shaped rewards s (arXiv numbers at the right):

    grpo           (s_i - mean s) / (std s + GROUP_EPS), std biased    DeepSeekMath, 2402.03300
                   s_i itself with group_normalize = false             AReaL, 2505.24298
    dr_grpo        s_i - mean s                                        Dr. GRPO, 2503.20783
    rloo           s_i - mean of the other samples                     2402.14740
                     = G / (G - 1) (s_i - mean s)
    reinforce_pp   s_i, normalized over the batch                      REINFORCE++, 2501.03262

    turn_grpo      (R_ik - mean R_k) / (std R_k + GROUP_EPS)           GTPO, 2511.14846
                     R_ik = sum over l >= k of gamma^(l - k) s_il
                     R_k: of the samples of the group that have a turn k (MT-GRPO, 2505.11821)
                   R_ik itself with group_normalize = false            REINFORCE

s_ik is the shaped reward of turn k of sample i (turns.py); with one turn turn_grpo is grpo.

With batch_normalize (always for reinforce_pp) the result is (A - mean) / (std + BATCH_EPS) over all
generated tokens of the batch, std biased. All computations are in float64.

A user's estimator has the same interface as the built-in ones: (shaped rewards [G, S], generated
tokens [G, S], AdvantageConfig) -> advantages, and one with the parameter `turns` gets the Turns of
the samples, too. It must depend on nothing else: after a restart of the trainer the advantages of a
batch are computed again.

Suffixes: G groups of the batch, S samples of a group, K turns and N generated tokens of one sample.
"""

from __future__ import annotations

import numpy as np

from megatron_async_rl import hooks
from megatron_async_rl.config.algorithm import AdvantageConfig, AlgorithmConfig, FilterConfig
from megatron_async_rl.controller.turns import (
    Turns,
    TurnsGS,
    rewards_to_go,
    shaped_turns,
    single_turns,
)
from megatron_async_rl.errors import HookFailed

GROUP_EPS = 1e-6  # added to a group's standard deviation
BATCH_EPS = 1e-5  # added outside the square root, as AReaL does
FLOAT32_MAX = float(np.finfo(np.float32).max)  # the trainer's advantages are float32
SETTING = "algorithm.advantage.estimator"

Advantages = np.ndarray | list[list[np.ndarray]]
"""One value per sample [groups, samples], or for each group and sample one per generated token."""


def sample_advantages(
    rewards_GS: np.ndarray,
    tokens_GS: np.ndarray,
    algorithm: AlgorithmConfig,
    max_new_tokens: int | None = None,
    turns_GS: TurnsGS | None = None,
) -> Advantages:
    """Returns the advantages of one batch in float64, with a critic the shaped rewards.

    `tokens_GS`: generated tokens per sample. `max_new_tokens`: limit per sample; only the overlong
    penalty needs it. `turns_GS`: with the rewards as they were given; without them each sample is
    one turn. Raises ValueError if the limit is missing, HookFailed if a user's estimator fails.
    """
    shaped_GS = shaped_rewards(rewards_GS, algorithm)
    if algorithm.reward_shaping.overlong_buffer_tokens:
        if max_new_tokens is None:
            raise ValueError("the overlong penalty needs max_new_tokens")
        shaped_GS = shaped_GS - algorithm.reward_shaping.overlong_penalty * overlong_share(
            tokens_GS, max_new_tokens, algorithm.reward_shaping.overlong_buffer_tokens
        )
    config = algorithm.advantage
    estimate = hooks.guarded(SETTING, config.estimator)
    tokens_GS = np.asarray(tokens_GS)
    if hooks.takes(estimate, "turns"):
        turns_GS = turns_GS or single_turns(rewards_GS, tokens_GS)
        turns_GS = shaped_turns(turns_GS, shaped_GS, reward_scale(algorithm))
        num_GS = np.asarray([[len(turns.rewards) for turns in group] for group in turns_GS])
        returned = estimate(shaped_GS, tokens_GS.copy(), config, turns=turns_GS)
        advantages = _checked(returned, num_GS, config.estimator, "turn")
        if not isinstance(advantages, np.ndarray):
            advantages = [
                [turns.per_token(a_K) for turns, a_K in zip(*row, strict=True)]
                for row in zip(turns_GS, advantages, strict=True)
            ]
    else:
        returned = estimate(shaped_GS, tokens_GS.copy(), config)
        advantages = _checked(returned, tokens_GS, config.estimator, "generated token")
    if not config.batch_normalize or config.uses_critic:
        return advantages
    if isinstance(advantages, np.ndarray):
        return batch_normalized(advantages, tokens_GS)
    all_N = np.concatenate([a_N for row in advantages for a_N in row])
    mean, deviation = all_N.mean(), all_N.std()
    return [[(a_N - mean) / (deviation + BATCH_EPS) for a_N in row] for row in advantages]


def needs_turns(config: AdvantageConfig) -> bool:
    """Returns whether the estimator, or the critic in its place, reads the rewards of turns."""
    return config.uses_critic or hooks.takes(hooks.load(SETTING, config.estimator), "turns")


def check_estimator(algorithm: AlgorithmConfig) -> None:
    """Calls the estimator with a batch. Raises ConfigError or HookFailed if it fails.

    With filters no group has equal rewards, which an estimator need not accept then.
    """
    tokens_GS = np.full((algorithm.prompts_per_step, algorithm.samples_per_prompt), 3)
    rewards_GS = np.zeros(tokens_GS.shape)
    filtered = algorithm.filters != FilterConfig()
    rewards_GS[: None if filtered else 1, 0] = 1.0
    sample_advantages(rewards_GS, tokens_GS, algorithm, max_new_tokens=8)


def reward_scale(algorithm: AlgorithmConfig) -> float:
    """Returns the factor of a reward in its shaped reward."""
    return 2 * algorithm.reward_shaping.scale


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


def token_means(advantages: Advantages) -> np.ndarray:
    """Returns the mean advantage of each sample [groups, samples], 0 without tokens."""
    if isinstance(advantages, np.ndarray):
        return advantages
    return np.asarray([[a_N.mean() if len(a_N) else 0.0 for a_N in row] for row in advantages])


def _checked(returned: object, counts_GS: np.ndarray, estimator: str, part: str) -> Advantages:
    """Returns the result of an estimator in float64. Raises HookFailed if its form is wrong.

    It is one value per sample, or one per part of a sample, of which there are `counts_GS`.
    """

    def wrong(problem: str) -> HookFailed:
        return HookFailed(
            f"{SETTING} = {estimator} returned {problem}",
            f"return an array of shape {counts_GS.shape}, or for each group a list of arrays with "
            f"one entry per {part}",
        )

    advantages: Advantages
    if isinstance(returned, np.ndarray):
        if returned.shape != counts_GS.shape or returned.dtype.kind not in "fiub":
            raise wrong(f"an array of shape {returned.shape} and type {returned.dtype}")
        advantages = returned.astype(np.float64)
    else:
        try:
            advantages = [[np.asarray(a, np.float64) for a in row] for row in returned]  # type: ignore[attr-defined]
        except (TypeError, ValueError, RuntimeError):  # the last: a tensor that requires grad
            raise wrong(f"a {type(returned).__name__}") from None
        shapes = [[a.shape for a in row] for row in advantages]
        if shapes == [[()] * len(row) for row in counts_GS]:  # lists of numbers, or a tensor
            advantages = np.asarray(advantages)
        elif shapes != [[(n,) for n in row] for row in counts_GS.tolist()]:
            raise wrong(f"lists of other lengths than the samples have {part}s")
    if not all((np.abs(a) <= FLOAT32_MAX).all() for row in advantages for a in row):
        raise HookFailed(
            f"{SETTING} = {estimator} returned nan, infinity or a number beyond float32",
            "return finite numbers, also for equal rewards: a standard deviation may be 0",
        )
    return advantages


# ---- the built-in estimators


def grpo(rewards_GS: np.ndarray, tokens_GS: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    if not config.group_normalize:
        return rewards_GS
    centered_GS = dr_grpo(rewards_GS, tokens_GS, config)
    return centered_GS / (centered_GS.std(axis=1, keepdims=True) + GROUP_EPS)


def dr_grpo(rewards_GS: np.ndarray, tokens_GS: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    return rewards_GS - rewards_GS.mean(axis=1, keepdims=True)


def rloo(rewards_GS: np.ndarray, tokens_GS: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    size = rewards_GS.shape[1]
    if size == 1:
        return np.zeros_like(rewards_GS)
    return dr_grpo(rewards_GS, tokens_GS, config) * (size / (size - 1))


def reinforce_pp(
    rewards_GS: np.ndarray, tokens_GS: np.ndarray, config: AdvantageConfig
) -> np.ndarray:
    if config.batch_normalize:  # then the caller normalizes
        return rewards_GS
    return batch_normalized(rewards_GS, tokens_GS)


def gae(rewards_GS: np.ndarray, tokens_GS: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """Returns the rewards: the critic in the trainer turns them into advantages."""
    return rewards_GS


turn_gae = gae


def turn_grpo(
    rewards_GS: np.ndarray, tokens_GS: np.ndarray, config: AdvantageConfig, turns: TurnsGS
) -> list[list[np.ndarray]]:
    return [_of_group_turns(group, config) for group in turns]


def _of_group_turns(group: list[Turns], config: AdvantageConfig) -> list[np.ndarray]:
    """Compares the rewards to go of each turn with those of the same turn of the other samples."""
    advantages = [rewards_to_go(turns.rewards, config.gamma) for turns in group]
    if not config.group_normalize:
        return advantages
    for k in range(max(map(len, advantages))):
        compared = [a_K for a_K in advantages if len(a_K) > k]
        returns = np.array([[a_K[k] for a_K in compared]])
        for a_K, normalized in zip(compared, grpo(returns, returns, config)[0], strict=True):
            a_K[k] = normalized
    return advantages


def batch_normalized(advantages_GS: np.ndarray, tokens_GS: np.ndarray) -> np.ndarray:
    """Normalizes to mean 0 and variance 1 over tokens; returns the input if there are no tokens."""
    num_tokens = tokens_GS.sum()
    if not num_tokens:
        return advantages_GS
    mean = (advantages_GS * tokens_GS).sum() / num_tokens
    variance = ((advantages_GS - mean) ** 2 * tokens_GS).sum() / num_tokens
    return (advantages_GS - mean) / (np.sqrt(variance) + BATCH_EPS)
