"""Configurations for tests: a minimal one with changes, and short names for `algorithm:`."""

from __future__ import annotations

import copy
from typing import Any

import msgspec

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.config.config import Config

_SPECIAL = {
    "advantage": ("advantage", "estimator"),
    "loss": ("loss", "objective"),
    "kl_coef": ("kl", "coef"),
    "kl_in": ("kl", "apply_to"),
    "kl_estimator": ("kl", "estimator"),
    "reward_scale": ("reward_shaping", "scale"),
    "reward_bias": ("reward_shaping", "bias"),
    "reward_clip": ("reward_shaping", "clip"),
}
_GROUPS = ("advantage", "loss", "staleness_correction", "kl", "filters", "reward_shaping")


def algorithm_tree(**settings: Any) -> dict[str, Any]:
    """Returns the `algorithm:` section: `clip_eps=0.1` gives {"loss": {"clip_eps": 0.1}}.

    `advantage` and `loss` stand for the estimator and the objective.
    """
    groups = {field.name: field.type for field in msgspec.structs.fields(AlgorithmConfig)}
    places = {
        field.name: (group, field.name)
        for group in _GROUPS
        for field in msgspec.structs.fields(groups[group])
    } | _SPECIAL
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        if name in places:
            group, field = places[name]
            tree.setdefault(group, {})[field] = value
        else:
            tree[name] = value
    return tree


def algorithm_config(**settings: Any) -> AlgorithmConfig:
    return msgspec.convert(algorithm_tree(**settings), AlgorithmConfig, strict=True)


MINIMAL_TREE: dict[str, Any] = {
    "run": {"dir": "runs/a", "steps": 10},
    "model": {"path": "models/a", "context_tokens": 128},
    "data": {"train": "train.jsonl"},
    "rollout": {"max_new_tokens": 64},
    "algorithm": {"prompts_per_step": 4, "samples_per_prompt": 2},
}


def config_tree(**changes: Any) -> dict[str, Any]:
    """The smallest configuration with dotted keys set: tree(**{"staleness.max_staleness": 0})."""
    changed = copy.deepcopy(MINIMAL_TREE)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = changed
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return changed


def trainer_config(precision: str = "fp32", steps: int = 10, **megatron: Any) -> Config:
    return configuration.from_tree(
        {
            "run": {"dir": "unused", "steps": steps},
            "model": {"path": "unused", "context_tokens": 64},
            "data": {"train": "unused"},
            "rollout": {"max_new_tokens": 32},
            "algorithm": {"prompts_per_step": 8, "samples_per_prompt": 2},
            "trainer": {"precision": precision},
            "megatron": megatron,
        }
    )
