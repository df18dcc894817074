"""The settings that the core depends on (config/ documents each)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_async_rl.config.config import Config
from megatron_async_rl.model.config_json import HfConfig


@dataclass(frozen=True)
class CoreSettings:
    prompts_per_step: int
    samples_per_prompt: int
    max_staleness: int
    wait_for_stragglers: bool
    straggler_timeout_s: float
    max_new_tokens: int
    temperature: float
    eval_temperature: float
    lease_timeout_s: float
    max_attempts: int
    max_scoring_attempts: int
    drop_equal_rewards: bool
    heartbeat_timeout_s: float
    steps: int
    data_parallel_size: int
    success_rates: tuple[float, float] = (-math.inf, math.inf)  # a group's mean reward, inclusive
    context_tokens: int = 1 << 24
    vocab_size: int = 1 << 31
    single_turn: bool = True  # a sample is the prompt and one response


def core_settings(config: Config) -> CoreSettings:
    algorithm, filters = config.algorithm, config.algorithm.filters
    return CoreSettings(
        prompts_per_step=algorithm.prompts_per_step,
        samples_per_prompt=algorithm.samples_per_prompt,
        max_staleness=config.staleness.max_staleness,
        wait_for_stragglers=config.staleness.straggler_policy == "wait",
        straggler_timeout_s=config.staleness.straggler_timeout_s,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        eval_temperature=config.data.eval_temperature,
        lease_timeout_s=config.rollout.lease_timeout_s,
        max_attempts=config.rollout.max_attempts,
        max_scoring_attempts=config.reward.max_attempts,
        drop_equal_rewards=filters.drop_equal_rewards,
        heartbeat_timeout_s=config.faults.heartbeat_timeout_s,
        steps=config.run.steps,
        data_parallel_size=config.num_leaders,
        success_rates=(
            -math.inf if filters.success_rate_min is None else filters.success_rate_min,
            math.inf if filters.success_rate_max is None else filters.success_rate_max,
        ),
        context_tokens=config.model.context_tokens,
        vocab_size=HfConfig(config.model.path).vocab_size,
        single_turn=config.rollout.workflow == "single_turn",
    )
