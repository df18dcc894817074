"""A simulated SGLang server: continuous batching under a limit of samples and of KV cache.

All running samples get one token per decode step, so a server has one count of steps, and a sample
ends when that count reaches its own. A step's time is linear in batch and context, so the time of k
steps has a closed form and the simulation only stops where the batch changes. As in SGLang, prefill
comes before decoding, and when the KV cache is full the sample with the fewest generated tokens
waits again and is prefilled again.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field

from megatron_async_rl.planning.costs import Costs
from megatron_async_rl.protocol.messages import Generate

RESERVED_SHARE, RESERVED_TOKENS = 0.1, 4096  # SGLang keeps room for this share of the next tokens
EPSILON = 1e-6  # tokens; rounding of the count of steps


@dataclass(eq=False)
class Request:
    """One sample of a lease on a server."""

    lease: Generate
    index: int
    prompt_tokens: int
    response_tokens: int
    prefill_tokens: int  # to compute when it starts
    generated: float = 0.0  # before `started_at`
    started_at: float = 0.0  # count of decode steps of its server
    versions: list[tuple[int, float]] = field(default_factory=list)  # (version, tokens), in order

    @property
    def left(self) -> float:
        return self.response_tokens - self.generated

    def label(self, version: int) -> None:
        """Notes that the tokens since the last note are of this version."""
        tokens = self.generated - sum(tokens for _, tokens in self.versions)
        if tokens > EPSILON:
            self.versions.append((version, tokens))


class Server:
    def __init__(self, name: str, costs: Costs, max_running: int, max_new_tokens: int) -> None:
        self.name = name
        self.version = 0
        self.paused = False
        self.busy_s = 0.0
        self.generated_tokens = 0.0
        self.num_retracted = 0
        self._costs = costs
        self._max_running = max_running
        self._reserve = RESERVED_SHARE * min(max_new_tokens, RESERVED_TOKENS)
        self._now = 0.0
        self._steps = 0.0  # decode steps so far
        self._prefill_s = 0.0  # left to do before decoding continues
        self._context = 0.0  # tokens in the KV cache of running samples
        self._running: list[tuple[float, int, Request]] = []  # heap by the count at their end
        self._waiting: deque[Request] = deque()
        self._order = itertools.count()

    @property
    def is_empty(self) -> bool:
        return not self._running and not self._waiting

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_use(self) -> float:
        return self._context / self._costs.kv_tokens

    def add(self, requests: list[Request], now: float) -> None:
        self.advance(now)
        self._waiting += requests
        self._start_waiting()

    def advance(self, now: float) -> None:
        """Does the prefill and the decode steps until `now`, in which no sample may end."""
        elapsed_s, self._now = now - self._now, now
        if self.paused or elapsed_s <= 0:
            return
        prefill_s = min(elapsed_s, self._prefill_s)
        self._prefill_s -= prefill_s
        self.busy_s += prefill_s
        decode_s, count = elapsed_s - prefill_s, len(self._running)
        if decode_s > 0 and count:
            first_s = self._step_s()
            slope_s = count * self._costs.decode.context_token_s  # each step is that much longer
            # the positive root of first_s * k + slope_s * k^2 / 2 = decode_s, without cancellation
            steps = 2 * decode_s / (first_s + math.sqrt(first_s**2 + 2 * slope_s * decode_s))
            self._steps += steps
            self._context += steps * count
            self.generated_tokens += steps * count
            self.busy_s += decode_s

    def next_change_s(self) -> float | None:
        """Returns the time until a sample ends or the KV cache is full; None if nothing runs."""
        count = len(self._running)
        if self.paused or not count:
            return None
        steps = self._running[0][0] - self._steps
        if count > 1:
            steps = min(steps, (self._costs.kv_tokens - self._context) / count)
        steps = max(steps, 0.0)
        slope_s = count * self._costs.decode.context_token_s
        return self._prefill_s + steps * self._step_s() + slope_s * steps**2 / 2

    def take_finished(self, now: float) -> list[Request]:
        """Advances to `now` and returns the samples that have ended; others take their places."""
        self.advance(now)
        finished = []
        while self._running and self._running[0][0] <= self._steps + EPSILON:
            request = heapq.heappop(self._running)[2]
            request.generated = request.response_tokens
            request.label(self.version)
            self._context -= request.prompt_tokens + request.response_tokens
            finished.append(request)
        while len(self._running) > 1 and self._context >= self._costs.kv_tokens - EPSILON:
            self._retract_youngest()
        self._start_waiting()
        return finished

    def interrupt(self, now: float, keep_kv: bool) -> None:
        """Pauses for a weight update; without `keep_kv` all running samples are prefilled again."""
        self.advance(now)
        self.paused = True
        for _, _, request in self._running:
            self._account(request)
            request.label(self.version)
        if not keep_kv:
            contexts = [r.prompt_tokens + r.generated for _, _, r in self._running]
            self._prefill_s = sum(map(self._costs.prefill.seconds, contexts))

    def resume(self, version: int, now: float) -> None:
        """Continues under new weights."""
        self.advance(now)
        self.paused, self.version = False, version
        self._start_waiting()

    def _step_s(self) -> float:
        return self._costs.decode.seconds(len(self._running), self._context)

    def _account(self, request: Request) -> None:
        """Brings the generated tokens of a running sample up to date."""
        request.generated += self._steps - request.started_at
        request.started_at = self._steps

    def _start_waiting(self) -> None:
        while not self.paused and self._waiting and len(self._running) < self._max_running:
            request = self._waiting[0]
            needed = request.prompt_tokens + request.generated
            reserved = self._reserve * (len(self._running) + 1)
            if self._running and self._context + needed + reserved > self._costs.kv_tokens:
                return
            self._waiting.popleft()
            self._prefill_s += self._costs.prefill.seconds(request.prefill_tokens)
            self._context += needed
            request.started_at = self._steps
            end = self._steps + request.left
            heapq.heappush(self._running, (end, next(self._order), request))

    def _retract_youngest(self) -> None:
        for _, _, request in self._running:
            self._account(request)
        entry = min(self._running, key=lambda entry: entry[2].generated)
        self._running.remove(entry)
        heapq.heapify(self._running)
        request = entry[2]
        request.label(self.version)
        self._context -= request.prompt_tokens + request.generated
        request.prefill_tokens = request.prompt_tokens + math.ceil(request.generated)
        self._waiting.appendleft(request)
        self.num_retracted += 1
