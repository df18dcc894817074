"""The part of `selftest` that needs no trainer: loads every hook, checks the advantages.

The policy objective is checked by the trainer's ranks (trainer/algorithms/contract.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from megatron_async_rl import hooks
from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.config.config import Config
from megatron_async_rl.controller import advantage
from megatron_async_rl.controller.turns import Turns
from megatron_async_rl.errors import ConfigError, HookFailed

MAX_TOKENS = 50
TOLERANCE = 1e-9


def check_hooks(config: Config, say: Callable[[str], None]) -> bool:
    """Loads the configured hooks and checks the advantages; prints one line for each result.

    Returns whether all checks passed.
    """
    passed = True
    for setting, value in hooks.custom_hooks(config).items():
        try:
            hooks.load(setting, value)
        except ConfigError as e:
            say(f"FAILED {e}")
            passed = False
    if not passed:
        return False
    algorithm = config.algorithm
    checks = list(advantage_checks(algorithm))
    lines = hooks.check_lines(advantage.SETTING, algorithm.advantage.estimator, checks)
    for line in lines:
        say(line)
    return not any(problem for _, problem in checks)


def advantage_checks(algorithm: AlgorithmConfig) -> Iterator[tuple[str, str]]:
    """Yields (check, problem) of the configured estimator, the problem empty if it holds.

    Ends at a problem that makes the following checks meaningless.
    """
    rng = np.random.default_rng(0)
    shape = (algorithm.prompts_per_step, algorithm.samples_per_prompt)
    rewards_GS, tokens_GS = rng.random(shape), rng.integers(1, MAX_TOKENS + 1, shape)

    def estimated(rewards_GS: np.ndarray, tokens_GS: np.ndarray) -> advantage.Advantages:
        turns_GS = [
            [_split(r, n) for r, n in zip(*row, strict=True)]
            for row in zip(rewards_GS, tokens_GS, strict=True)
        ]
        return advantage.sample_advantages(rewards_GS, tokens_GS, algorithm, MAX_TOKENS, turns_GS)

    batches = {
        "rewards": rewards_GS,
        "equal rewards": np.ones(shape),
        "binary rewards": (rewards_GS > 0.5).astype(np.float64),
        "large rewards": rewards_GS * 1e6,
    }
    for name, batch_GS in batches.items():
        try:
            estimated(batch_GS, tokens_GS)
        except HookFailed as e:
            yield name, str(e).partition("\n")[0]
            return
        yield name, ""
    want = estimated(rewards_GS, tokens_GS)
    if not _are_close(estimated(rewards_GS, tokens_GS), want, 0.0):
        yield (
            "repeatable",
            "two calls with the same inputs differ; use no random numbers and keep no state: a "
            "batch is computed again after a restart",
        )
        return
    yield "repeatable", ""
    order = rng.permutation(shape[0])
    permuted = estimated(rewards_GS[order], tokens_GS[order])
    is_same = _are_close(permuted, [want[g] for g in order], TOLERANCE)
    problem = "the advantages of a group depend on its place in the batch"
    yield "order of groups", "" if is_same else problem


def _split(reward: float, num_tokens: int) -> Turns:
    """Returns a sample of one to four turns; how many depends on its length."""
    lengths = [len(part) for part in np.array_split(np.arange(num_tokens), 1 + num_tokens % 4)]
    lengths_K = np.array([length for length in lengths if length])
    shares_K = np.arange(1, len(lengths_K) + 1) / np.arange(1, len(lengths_K) + 1).sum()
    return Turns(reward * shares_K, lengths_K.cumsum() - lengths_K, lengths_K)


def _are_close(
    got: advantage.Advantages, want: advantage.Advantages | list, tolerance: float
) -> bool:
    pairs = [
        (a, b)
        for row, other in zip(got, want, strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    return all(np.allclose(a, b, tolerance, tolerance) for a, b in pairs)
