"""The settings that the core depends on (config/ documents each)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.core.groups import DropReason
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.routing import Routing, replayed_routing

FilterRule = tuple[DropReason, Callable[[list[float], list[int], dict[str, Any]], bool]]
"""Drops a group for the reason unless (its rewards, generated tokens by sample, row) is true."""


@dataclass(frozen=True)
class CoreSettings:
    prompts_per_step: int
    samples_per_prompt: int
    max_staleness: int
    wait_for_stragglers: bool
    straggler_timeout_s: float
    max_new_tokens: int
    temperature: float
    lease_timeout_s: float
    max_attempts: int
    max_scoring_attempts: int
    heartbeat_timeout_s: float
    steps: int
    data_parallel_size: int
    filter_rules: tuple[FilterRule, ...] = ()
    context_tokens: int = 1 << 24
    vocab_size: int = 1 << 31
    single_turn: bool = True  # a sample is the prompt and one response
    max_sequences: int = 1  # of one sample; more than 1 with agents
    truncation: dict[str, Any] = field(default_factory=dict)  # top_p, top_k, min_p (rollout_only)
    routing: Routing | None = None  # of the experts that samples have
    kv_lease_limit: float | None = None  # None: leases by the number of samples alone


def core_settings(config: Config, filter_rules: tuple[FilterRule, ...] = ()) -> CoreSettings:
    algorithm = config.algorithm
    return CoreSettings(
        prompts_per_step=algorithm.prompts_per_step,
        samples_per_prompt=algorithm.samples_per_prompt,
        max_staleness=config.staleness.max_staleness,
        wait_for_stragglers=config.staleness.straggler_policy == "wait",
        straggler_timeout_s=config.staleness.straggler_timeout_s,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        lease_timeout_s=config.rollout.lease_timeout_s,
        max_attempts=config.rollout.max_attempts,
        max_scoring_attempts=config.reward.max_attempts,
        heartbeat_timeout_s=config.faults.heartbeat_timeout_s,
        steps=config.run.steps,
        data_parallel_size=config.num_leaders,
        filter_rules=filter_rules,
        context_tokens=config.model.context_tokens,
        vocab_size=HfConfig(config.model.path).vocab_size,
        single_turn=config.rollout.workflow == "single_turn" and not config.has_agent,
        max_sequences=config.max_sequences,
        truncation={name: getattr(config.rollout, name) for name in ("top_p", "top_k", "min_p")},
        routing=replayed_routing(config),
        kv_lease_limit=config.rollout.kv_lease_limit,
    )
