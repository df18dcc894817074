"""The settings that the core goes by (config.py says what each means)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_async_rl.config import Config


@dataclass(frozen=True)
class Rules:
    prompts_per_step: int
    samples_per_prompt: int
    eta: int
    wait_for_stragglers: bool
    straggler_wait_s: float
    max_new_tokens: int
    temperature: float
    eval_temperature: float
    lease_timeout_s: float
    max_attempts: int
    max_verdict_attempts: int
    drop_equal_rewards: bool
    silence_limit_s: float
    steps: int
    data_parallel_size: int
    success_rates: tuple[float, float] = (-math.inf, math.inf)  # groups of a lower or higher mean reward are dropped


def rules_of(config: Config) -> Rules:
    algorithm = config.algorithm
    return Rules(
        prompts_per_step=algorithm.prompts_per_step,
        samples_per_prompt=algorithm.samples_per_prompt,
        eta=config.staleness.eta,
        wait_for_stragglers=config.staleness.straggler == "wait",
        straggler_wait_s=config.staleness.straggler_wait_s,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        eval_temperature=config.data.eval_temperature,
        lease_timeout_s=config.rollout.lease_timeout_s,
        max_attempts=config.rollout.max_attempts,
        max_verdict_attempts=config.reward.max_attempts,
        drop_equal_rewards=algorithm.drop_equal_rewards,
        success_rates=(
            -math.inf if algorithm.success_rate_min is None else algorithm.success_rate_min,
            math.inf if algorithm.success_rate_max is None else algorithm.success_rate_max,
        ),
        silence_limit_s=config.faults.silence_s,
        steps=config.run.steps,
        data_parallel_size=config.num_leaders,
    )
