"""Routing replay: the routers of a model choose the experts that the engine chose.

megatron.core's TopKRouter asks its `router_replay`, where it has one, for the experts of a token,
and computes their weights from its own scores, so gradients reach the router as usual.
megatron.core's class for it returns the same experts until others are set; here each pass of a
micro-batch sets its own, and a recomputation in backward gets those of its forward pass.

Suffixes: T positions of a micro-batch that this rank holds, L layers, K experts per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_async_rl.model.routing import Routing
from megatron_async_rl.trainer import parallel

TopK = Callable[..., tuple[Tensor, Tensor]]


class RoutingReplay:
    """The replay of all routers of this rank's modules."""

    def __init__(self, modules: list[Any], routing: Routing) -> None:
        self.routing = routing
        routers = [router for module in modules for router in _routers(module)]
        numbers = [router.layer_number - 1 for router in routers]  # none: a stage without experts
        self._layers = torch.tensor(numbers, dtype=torch.long)
        self._replays = [RouterReplay() for _ in routers]
        for router, replay in zip(routers, self._replays, strict=True):
            router.router_replay = replay

    def clear(self) -> None:
        """Forgets the experts of passes without a backward."""
        for replay in self._replays:
            replay.recomputed.clear()

    @contextmanager
    def of(self, experts_TLK: Tensor | None) -> Iterator[None]:
        """Makes the routers choose these experts in a forward pass; None: their own choice."""
        if experts_TLK is None:
            yield
            return
        local = experts_TLK.index_select(1, self._layers).to(parallel.device())
        for index, replay in enumerate(self._replays):
            replay.experts_TK = local[:, index]
            replay.has_backward = torch.is_grad_enabled()
        try:
            yield
        finally:
            for replay in self._replays:
                replay.experts_TK = None


class RouterReplay:
    """The choice of one router."""

    def __init__(self) -> None:
        self.experts_TK: Tensor | None = None  # of the forward pass in progress
        self.has_backward = False
        self.recomputed: deque[Tensor] = deque()
        """Experts of forward passes that backward repeats, which it does in the same order."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (scores [T, K], experts [T, K]); called by megatron.core's router."""
        assert default_compute_topk is not None
        own_scores, own_TK = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        experts_TK = self._next()
        if experts_TK is None:
            return own_scores, own_TK
        if len(experts_TK) != len(scores):  # sequence parallelism splits the positions
            experts_TK = experts_TK.chunk(mpu.get_tensor_model_parallel_world_size())[
                mpu.get_tensor_model_parallel_rank()
            ]
        ordered_TK = experts_TK.sort(dim=1).values
        repeated_T = (ordered_TK[:, 1:] == ordered_TK[:, :-1]).any(dim=1, keepdim=True)
        chosen_TK = torch.where(repeated_T, own_TK, experts_TK.to(own_TK.dtype))
        return scores.gather(1, chosen_TK), chosen_TK

    def _next(self) -> Tensor | None:
        if self.experts_TK is None:
            return self.recomputed.popleft() if self.recomputed else None
        if self.has_backward and not torch.is_grad_enabled():  # within a checkpointed layer
            self.recomputed.append(self.experts_TK)
        return self.experts_TK


def _routers(module: nn.Module) -> list[TopKRouter]:
    return [part for part in module.modules() if isinstance(part, TopKRouter)]
