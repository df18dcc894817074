"""Short names for the settings of `algorithm:`, which tests change often."""

from __future__ import annotations

from typing import Any

import msgspec

from megatron_async_rl.config.algorithm import AlgorithmConfig

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
    """Returns the `algorithm:` section as YAML has it: `clip_eps=0.1` becomes {"loss": {"clip_eps": 0.1}}.

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
