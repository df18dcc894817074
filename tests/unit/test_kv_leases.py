"""Leases by KV cache: a server is kept busy, and neither queues nor retracts for memory."""

from __future__ import annotations

import math
import random

import pytest
from core_builders import (
    finish_lease,
    join_workers,
    make_core,
    make_sample,
    messages_of,
    restart_core,
)
from kv_server import KvServer, Totals

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.kv_cache import ResponseLengths
from megatron_async_rl.protocol.messages import Generate, Heartbeat
from megatron_async_rl.protocol.types import Prompt

MEAN, MAX_NEW, CAPACITY, GROUP = 50, 400, 3000, 4


def report(core: Core, capacity: float, use: float = 0.0, queued: float = 0.0) -> list[Generate]:
    """Returns the leases that follow from a heartbeat of rollout-0."""
    figures = {"kv_capacity_tokens": capacity, "kv_use_fraction": use, "queued_requests": queued}
    event = inputs.Received("rollout-0", Heartbeat(engine=figures))
    return messages_of(core.handle(event, 0), Generate)


def leased(core: Core) -> list[Generate]:
    """Returns the leases that rollout-0 gets when it begins to serve."""
    core.handle(inputs.RewardJoined("reward-0", 100), 0)
    return messages_of(core.handle(inputs.ServerUpdated("rollout-0", version=0), 0), Generate)


def core_of_one_server(capacity: float) -> tuple[Core, list[Generate]]:
    """Returns a core whose server may use half of its KV cache, and its first leases."""
    core = make_core(prompts_per_step=100, kv_lease_limit=0.5)
    core.handle(inputs.RolloutJoined("rollout-0", 64), 0)
    assert report(core, capacity) == []
    return core, leased(core)


def test_server_gets_samples_up_to_its_kv_cache() -> None:
    # a sample is expected to hold half of max_new_tokens = 8; a group of two 8, and its prompt 3
    _, leases = core_of_one_server(2 * 30)
    assert len(leases) == 3  # before the third 2 * 8 + 2 * 3, and 8 more fit into 30
    _, leases = core_of_one_server(2 * 100)
    assert len(leases) == 9


def test_without_a_report_or_a_limit_the_number_of_samples_decides() -> None:
    core = make_core(prompts_per_step=100, kv_lease_limit=0.5)
    assert len(join_workers(core, capacity=20)) == 10
    core = make_core(prompts_per_step=100)
    core.handle(inputs.RolloutJoined("rollout-0", 20), 0)
    report(core, 10)
    assert len(leased(core)) == 10


def test_short_samples_make_room_for_more() -> None:
    core, leases = core_of_one_server(2 * 100)
    before = core.fleet.rollout["rollout-0"].load
    for lease in leases:  # of one token each, where 4 were expected
        finish_lease(core, lease, 0)
    assert core.fleet.rollout["rollout-0"].load > before


def test_queue_pauses_leases_until_the_server_has_recovered() -> None:
    core, leases = core_of_one_server(2 * 30)
    server = core.fleet.rollout["rollout-0"]
    assert report(core, 60, use=0.55, queued=1) == []
    finish_lease(core, leases[0], 0)
    assert report(core, 60, use=0.55, queued=1) == [] and server.load == 4
    assert report(core, 60, use=0.4, queued=0) and server.load > 4


def test_queue_in_a_cache_that_is_mostly_free_is_of_prefills_and_pauses_nothing() -> None:
    core, leases = core_of_one_server(2 * 30)
    report(core, 60, use=0.1, queued=20)
    finish_lease(core, leases[0], 0)
    assert core.fleet.rollout["rollout-0"].load >= 6


def test_idle_server_gets_a_group_whatever_it_needs_and_reports() -> None:
    core, leases = core_of_one_server(4)
    assert len(leases) == 1  # the group needs more than the whole cache
    report(core, 4, use=1.0, queued=9)
    finish_lease(core, leases[0], 0)
    assert [group.group_id for group in core.state.running.of("rollout-0")] == [1]


def test_restarted_controller_knows_the_lengths_from_the_journal() -> None:
    core, leases = core_of_one_server(2 * 100)
    for lease in leases:
        finish_lease(core, lease, 0)
    restarted = restart_core(core, core.state.take_events())
    expected = core.state.lengths.running_tokens
    assert restarted.state.lengths.running_tokens == expected != 4


def test_sample_expected_to_run_is_longer_than_one_that_ended() -> None:
    lengths, r = ResponseLengths(1000.0), random.Random(0)
    assert lengths.running_tokens == 1000.0
    prompt = Prompt("0", make_sample(0).ids[:3], {})
    drawn = [10 if r.random() < 0.9 else 200 for _ in range(5000)]
    for length in drawn:
        lengths.add(prompt, make_sample(*[0] * length))
    in_flight = sum(length**2 for length in drawn) / (2 * sum(drawn))
    assert lengths.running_tokens == pytest.approx(in_flight, rel=0.15)
    assert in_flight > 2 * sum(drawn) / len(drawn)


def served(kv_lease_limit: float | None, sigma: float) -> Totals:
    """Serves log-normal lengths of mean 50 and at most 400 tokens with 3,000 tokens of KV cache."""
    r = random.Random(1)

    def draw() -> int:
        length = r.lognormvariate(math.log(MEAN) - sigma**2 / 2, sigma)
        return max(1, min(MAX_NEW, round(length)))

    return KvServer(draw, CAPACITY, kv_lease_limit, GROUP, MAX_NEW).run(900, warm_up=600)


def test_kv_limit_avoids_queues_and_most_retractions() -> None:
    by_number, by_kv = served(None, sigma=1.0), served(0.9, sigma=1.0)
    print(f"by number {by_number}, by KV {by_kv}")
    assert by_number.waiting > 100 * by_number.steps  # of up to 256 samples at once
    assert by_kv.idle == 0 and by_kv.used > 0.75 * CAPACITY * by_kv.steps
    assert by_kv.waiting < 2 * by_kv.steps
    assert by_kv.retracted < 0.3 * by_number.retracted


def test_answers_of_equal_length_fill_the_cache_too() -> None:
    by_kv = served(0.8, sigma=0.1)
    assert by_kv.idle == 0 and by_kv.used > 0.6 * CAPACITY * by_kv.steps
    assert by_kv.waiting < 0.2 * by_kv.steps and by_kv.retracted < 5
