"""Leases by KV cache: which servers are full, by the tokens that samples are expected to hold.

A group holds its prompt once, as its samples share a server's prefix cache. Of its response, of L
tokens at the end, a running sample of a server that is always refilled holds on average
E[L^2] / (2 E[L]) tokens: half of L if all are equal, more if few are long, as long ones run longer
(the inspection paradox of renewal theory). Both moments are learned from the samples that ended.

With E this expectation, a server is full if

    (running samples + samples of a group) * E + its prompts > kv_lease_limit * its KV cache

or if it reported pressure: more of its KV cache in use than kv_lease_limit, or requests that queue
while more than half is in use. It stays so until it reports otherwise. A server without a sample is
never full. Capacity and use are those that SGLang reports in heartbeats; until the first report the
number of samples (rollout.max_concurrent_samples) is the only limit.
"""

from __future__ import annotations

from megatron_async_rl.controller.core.fleet import RolloutWorker
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.protocol.types import Prompt, Sample

PRIOR_WEIGHT = 8  # samples that the prior counts as
WINDOW = 1024  # samples of a mean, so that it follows the lengths of a changing policy
QUEUE_USE = 0.5  # of the KV cache; with less in use a queue is of requests that wait for prefill


class ResponseLengths:
    """Streaming mean and mean square of response lengths; `prior`: expected tokens before any."""

    def __init__(self, prior: float) -> None:
        self._prior = self.running_tokens = (
            prior  # tokens that a running sample is expected to hold
        )
        self._mean = self._mean_square = 0.0
        self._count = 0

    def add(self, prompt: Prompt, sample: Sample) -> None:
        """Counts the longest sequence of a sample that ended, tool results included."""
        longest = len(sample.ids)
        if sample.starts:
            longest = max(part.stop - part.start for part in sample.sequences())
        tokens = max(longest - len(prompt.ids), 1)
        self._count = min(self._count + 1, WINDOW)
        self._mean += (tokens - self._mean) / self._count
        self._mean_square += (tokens * tokens - self._mean_square) / self._count
        learned = self._mean_square / (2 * self._mean)
        share = PRIOR_WEIGHT / (PRIOR_WEIGHT + self._count)
        self.running_tokens = share * self._prior + (1 - share) * learned


class KvLimit:
    """Marks servers as full; `update` must follow every change of a server's samples."""

    def __init__(self, settings: CoreSettings, lengths: ResponseLengths) -> None:
        self._limit = settings.kv_lease_limit
        self._group_size = settings.samples_per_prompt
        self._lengths = lengths

    def report(self, server: RolloutWorker, engine: dict[str, float]) -> bool:
        """Takes figures of a heartbeat; returns whether the server has got room by them."""
        capacity, use = engine.get("kv_capacity_tokens"), engine.get("kv_use_fraction")
        if self._limit is None or capacity is None or use is None:
            return False
        was_full = server.is_full, server.is_full_for_evaluation
        server.kv_tokens = self._limit * capacity
        queues = engine.get("queued_requests", 0.0) > 0 and use > QUEUE_USE
        server.has_pressure = use > self._limit or queues
        self.update(server)
        is_full = server.is_full, server.is_full_for_evaluation
        return any(was and not now for was, now in zip(was_full, is_full, strict=True))

    def update(self, server: RolloutWorker) -> None:
        """Decides whether the server takes another group, and another sample of an evaluation."""
        if server.kv_tokens is None:
            return
        each = self._lengths.running_tokens
        tokens = server.load * each + server.prompt_tokens
        no_room = server.has_pressure or tokens + self._group_size * each > server.kv_tokens
        tokens += (server.eval_load + 1) * each + server.eval_prompt_tokens
        no_eval_room = server.has_pressure or tokens > server.kv_tokens
        full = server.load > 0 and no_room, server.total_load > 0 and no_eval_room
        if full != (server.is_full, server.is_full_for_evaluation):
            server.is_full, server.is_full_for_evaluation = full
