"""A simulated SGLang server with a KV cache of a given size, driven by the real core.

A step of the server generates one token for each running request. As SGLang does, it takes a
waiting request while the prompt and an allowance of tokens for all running ones fit, and when the
cache is full it takes the running request with the fewest tokens back into the queue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core_builders import make_core, make_sample

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import Action, Send
from megatron_async_rl.protocol.messages import (
    Generate,
    Generated,
    Heartbeat,
    ScoreRequest,
    ScoreResult,
)

HEARTBEAT_STEPS = 5
ALLOWANCE = 0.1  # of the tokens that a request may still generate (new_token_ratio), ...
CLIP = 1 / 8  # ... which count up to this share of max_new_tokens (CLIP_MAX_NEW_TOKENS)
PROMPT_TOKENS = 3  # of core_builders.prompt_stream


@dataclass
class Request:
    lease: Generate
    index: int
    length: int  # tokens after which it ends
    tokens: int = 0


@dataclass
class Totals:
    """Sums over the steps counted."""

    steps: int = 0
    generated: int = 0
    used: int = 0  # KV tokens
    waiting: int = 0
    retracted: int = 0
    idle: int = 0  # steps without a running request


class KvServer:
    """`draw` returns the length of each response; `capacity`: KV tokens."""

    def __init__(
        self,
        draw: Callable[[], int],
        capacity: int,
        kv_lease_limit: float | None,
        group_size: int,
        max_new_tokens: int,
    ) -> None:
        self.core = make_core(
            prompts_per_step=10_000,
            samples_per_prompt=group_size,
            kv_lease_limit=kv_lease_limit,
            max_new_tokens=max_new_tokens,
        )
        self.draw, self.capacity, self.max_new_tokens = draw, capacity, max_new_tokens
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.totals = Totals()
        self.core.handle(inputs.RewardJoined("reward-0", 1), 0)
        self.core.handle(inputs.RolloutJoined("rollout-0", 256), 0)
        self.report()
        self.take(self.core.handle(inputs.ServerUpdated("rollout-0", version=0), 0))

    @property
    def used(self) -> int:
        prompts = len({request.lease.group_id for request in self.running})
        return prompts * PROMPT_TOKENS + sum(request.tokens for request in self.running)

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            if not isinstance(action, Send):
                continue
            if isinstance(lease := action.message, Generate):
                self.waiting += [Request(lease, index, self.draw()) for index in lease.indices]
            elif isinstance(action.message, ScoreRequest):
                result = ScoreResult(action.message.key, 1.0)
                self.take(self.core.handle(inputs.Received("reward-0", result), 0))

    def report(self) -> None:
        engine = {
            "kv_capacity_tokens": self.capacity,
            "kv_use_fraction": self.used / self.capacity,
            "queued_requests": len(self.waiting),
        }
        heartbeat = Heartbeat(engine=engine)
        self.take(self.core.handle(inputs.Received("rollout-0", heartbeat), 0))

    def run(self, steps: int, warm_up: int) -> Totals:
        """Returns the totals of the steps after the first `warm_up`."""
        for step in range(steps):
            if step == warm_up:
                self.totals = Totals()
            self._schedule()
            self._generate()
            if step % HEARTBEAT_STEPS == 0:
                self.report()
        return self.totals

    def _schedule(self) -> None:
        used, allowance = self.used, sum(map(self._allowance, self.running))
        while self.waiting:
            request = self.waiting[0]
            own = request.tokens + PROMPT_TOKENS
            allowance += self._allowance(request)
            if self.running and used + own + allowance > self.capacity:
                break
            self.running.append(self.waiting.pop(0))
            used += own
        used = self.used
        while used + len(self.running) > self.capacity:
            shortest = min(self.running, key=lambda request: request.tokens)
            self.running.remove(shortest)
            self.waiting.insert(0, shortest)
            self.totals.retracted += 1
            used = self.used

    def _allowance(self, request: Request) -> float:
        left = self.max_new_tokens - request.tokens
        return ALLOWANCE * min(left, CLIP * self.max_new_tokens)

    def _generate(self) -> None:
        totals = self.totals
        totals.steps += 1
        totals.generated += len(self.running)
        totals.used += self.used
        totals.waiting += len(self.waiting)
        totals.idle += not self.running
        for request in self.running:
            request.tokens += 1
        ended = [request for request in self.running if request.tokens >= request.length]
        self.running = [request for request in self.running if request.tokens < request.length]
        for request in ended:
            sample = make_sample(*[0] * request.length)
            reply = Generated(request.lease.key(request.index), sample)
            self.take(self.core.handle(inputs.Received("rollout-0", reply), 0))
