"""The experts that the engine chose, which the trainer uses again (rollout.routing_replay).

A sample has `width` = layers x top_k numbers for each token: the experts that the engine chose at
the position before it, from which the token was sampled. They are stored beside the token's logprob
and version, and the first token of a sequence has none. A layer without experts and a position that
the engine did not compute have the same number top_k times, which marks a missing choice: there the
trainer's router chooses.

Memory, journal and wire: `width` bytes per token, 384 for Qwen3-30B-A3B (48 x 8).
Source: R3, rollout routing replay, arXiv 2510.11370.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model.config_json import HfConfig


@dataclass(frozen=True, slots=True)
class Routing:
    """The sizes of a model's routing."""

    num_layers: int  # all layers, also those without experts
    top_k: int
    num_experts: int

    @property
    def width(self) -> int:
        """Numbers per token."""
        return self.num_layers * self.top_k

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)


def replayed_routing(config: Config) -> Routing | None:
    """Returns the routing of model.path; None without rollout.routing_replay.

    Raises ConfigError if the model has no choice of experts to replay, DataError for a model that
    is not supported.
    """
    if not config.rollout.routing_replay:
        return None
    model = HfConfig(config.model.path)
    shape = model.shape()
    if not shape.num_experts:
        raise ConfigError(
            f"rollout.routing_replay = true, but model.path = {config.model.path} "
            f"({shape.family.architecture}) has no experts",
            "remove rollout.routing_replay",
        )
    top_k = model.integer("num_experts_per_tok", least=0, default=0)
    if top_k < 2:
        raise ConfigError(
            f"rollout.routing_replay = true, but model.path = {config.model.path} has "
            f"num_experts_per_tok = {top_k}: a replayed choice has two experts or more",
            "remove rollout.routing_replay",
        )
    return Routing(shape.num_layers, top_k, shape.num_experts)
