"""Filters scored groups (`algorithm.filters`) by the configured rules in their order.

A user's filter has the same interface as the built-in ones: (rewards of the group, generated tokens
of each sample, row of the dataset, FilterConfig) -> whether the group is kept. It must depend on
nothing else: a restarted controller calls it again.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from megatron_async_rl import hooks
from megatron_async_rl.config.algorithm import FilterConfig
from megatron_async_rl.controller.core.groups import DropReason
from megatron_async_rl.controller.core.settings import FilterRule
from megatron_async_rl.errors import HookFailed

SETTING = "algorithm.filters.function"

GroupFilter = Callable[[list[float], list[int], dict[str, Any], FilterConfig], Any]


def filter_rules(config: FilterConfig) -> tuple[FilterRule, ...]:
    """Returns the configured rules. Raises ConfigError if a user's function cannot be loaded."""
    functions: list[tuple[DropReason, GroupFilter]] = []
    if config.drop_equal_rewards:
        functions.append((DropReason.EQUAL_REWARDS, rewards_differ))
    if (config.success_rate_min, config.success_rate_max) != (None, None):
        functions.append((DropReason.SUCCESS_RATE, success_rate_in_band))
    if config.function is not None:
        functions.append((DropReason.FILTERED, hooks.guarded(SETTING, config.function)))
    return tuple((reason, partial(_keeps, function, config)) for reason, function in functions)


def rewards_differ(
    rewards: list[float], lengths: list[int], row: dict[str, Any], config: FilterConfig
) -> bool:
    return len(set(rewards)) > 1


def success_rate_in_band(
    rewards: list[float], lengths: list[int], row: dict[str, Any], config: FilterConfig
) -> bool:
    mean, low, high = statistics.fmean(rewards), config.success_rate_min, config.success_rate_max
    return (low is None or low <= mean) and (high is None or mean <= high)


def _keeps(
    function: GroupFilter,
    config: FilterConfig,
    rewards: list[float],
    lengths: list[int],
    row: dict[str, Any],
) -> bool:
    """Calls a filter. Raises HookFailed if it does not return a boolean."""
    kept = function(rewards, lengths, copy.deepcopy(row), config)  # of the dataset: may not change
    if not isinstance(kept, bool | np.bool_):
        raise HookFailed(
            f"{SETTING} = {config.function} returned a {type(kept).__name__}",
            "return True to train on the group, False to drop it",
        )
    return bool(kept)
