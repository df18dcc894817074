"""The simulated run: hand-computed steps, bounds, staleness, KV cache, interrupts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from core_builders import core_settings

from megatron_async_rl.planning.costs import Costs, DecodeCosts, PrefillCosts, TrainCosts
from megatron_async_rl.planning.lengths import Lengths
from megatron_async_rl.planning.predict import average
from megatron_async_rl.planning.simulation import Simulation, Workload
from megatron_async_rl.planning.steps import Step

DECODE_S, TOKEN_S = 0.1, 0.01
EQUAL = Lengths(np.array([2]), np.array([10]))
UNEQUAL = Lengths(np.full(50, 2), np.arange(1, 51) ** 2 // 50 + 1)  # 1 to 51 tokens
COSTS = Costs(
    decode=DecodeCosts(DECODE_S, 0.0, 0.0),
    prefill=PrefillCosts(0.0),
    train=TrainCosts(TOKEN_S, forward_passes=1),
    update_s=0.5,
    kv_tokens=1e6,
    between_steps_s=0.2,
)


def workload(lengths: Lengths = EQUAL, eta: int = 0, **changes: object) -> Workload:
    standard: dict[str, object] = {
        "settings": core_settings(max_staleness=eta, steps=6, max_new_tokens=64),
        "lengths": lengths,
        "servers": 1,
        "concurrent": 8,
        "max_running": 8,
        "interrupt": "abort",
        "keep_kv": False,
    }
    return Workload(**(standard | changes))  # type: ignore[arg-type]


def steps(work: Workload, costs: Costs = COSTS) -> list[Step]:
    return list(Simulation(work, costs).steps())


def test_synchronous_step_is_the_sum_of_its_parts() -> None:
    """Four samples of 2 + 10 tokens: 10 decode steps, then 48 tokens of training."""
    first, *later = steps(workload())
    train_s, proximal_s = 48 * TOKEN_S, 16 * TOKEN_S
    assert first.seconds == pytest.approx(10 * DECODE_S + proximal_s + train_s)
    for step in later:
        assert step.seconds == pytest.approx(0.2 + 0.5 + 1.0 + proximal_s + train_s)
        assert step.wait_s == pytest.approx(1.0) and step.trained_tokens == 40
        assert (step.proximal_s, step.train_s) == pytest.approx((proximal_s, train_s))
        assert step.server_idle == pytest.approx(1 - 1.0 / step.seconds)
        assert step.mean_staleness == step.max_staleness == 0


def test_prefill_comes_before_decoding_and_once_for_a_group() -> None:
    costs = replace(COSTS, prefill=PrefillCosts(0.05))
    # each group computes its prompt of 2 tokens, and each other sample the last token of it
    assert steps(workload(), costs)[1].wait_s == pytest.approx(1.0 + 2 * (2 + 1) * 0.05)


def test_score_delays_the_batch() -> None:
    assert steps(workload(), replace(COSTS, score_s=0.3))[1].wait_s == pytest.approx(1.3)


def test_one_step_overlap_hides_the_shorter_part() -> None:
    """Equal lengths, eta 1, running samples finish: training and generation run side by side."""
    one = average(steps(workload(eta=1, interrupt="finish"))[2:])
    assert one.step_s < 0.9 * average(steps(workload())[2:]).step_s
    assert one.max_staleness == 1


@pytest.mark.parametrize("eta", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("token_s", [0.0001, 0.003, 0.02])  # generation-bound to training-bound
def test_throughput_and_staleness_stay_within_their_bounds(eta: int, token_s: float) -> None:
    costs = replace(COSTS, train=TrainCosts(token_s))
    settings = core_settings(max_staleness=eta, steps=40, max_new_tokens=64)
    found = steps(workload(UNEQUAL, eta, settings=settings), costs)
    assert max(step.max_staleness for step in found) <= eta
    seconds = sum(step.seconds for step in found)
    trained = sum(step.trained_tokens for step in found)
    train_s = sum(step.train_s for step in found)
    assert trained <= 8 / DECODE_S * seconds and train_s <= seconds
    assert sum(step.generated_tokens for step in found) >= trained * (1 - 1e-9)


def test_larger_staleness_is_not_slower() -> None:
    settings = [core_settings(max_staleness=eta, steps=40, max_new_tokens=64) for eta in (0, 1, 4)]
    rates = [
        average(steps(workload(UNEQUAL, settings=one))[5:]).trained_tokens_per_s for one in settings
    ]
    assert rates[0] < rates[1] <= rates[2] * 1.01


def test_interrupted_samples_are_prefilled_again_unless_kept() -> None:
    costs = replace(COSTS, prefill=PrefillCosts(0.05))
    settings = core_settings(max_staleness=4, steps=30, max_new_tokens=64)
    rates = [
        average(
            steps(workload(UNEQUAL, settings=settings, keep_kv=keep), costs)[5:]
        ).trained_tokens_per_s
        for keep in (False, True)
    ]
    assert rates[0] < 0.97 * rates[1]


def test_full_kv_cache_makes_samples_wait_and_loses_none() -> None:
    costs = replace(COSTS, kv_tokens=60.0, prefill=PrefillCosts(0.001))
    settings = core_settings(max_staleness=2, steps=10, max_new_tokens=64)
    simulation = Simulation(workload(UNEQUAL, settings=settings), costs)
    found = list(simulation.steps())
    assert len(found) == 10 and simulation.servers["rollout-0"].num_retracted > 0
    assert all(step.kv_use <= 1 + 1e-6 for step in found)


def test_leases_by_kv_cache_retract_less() -> None:
    retracted = []
    for limit in (None, 0.9):
        settings = core_settings(max_staleness=2, steps=20, max_new_tokens=64, kv_lease_limit=limit)
        costs = replace(COSTS, kv_tokens=100.0)
        simulation = Simulation(workload(UNEQUAL, settings=settings), costs)
        assert len(list(simulation.steps())) == 20
        retracted.append(simulation.servers["rollout-0"].num_retracted)
    assert retracted[1] < retracted[0] / 2


def test_dropped_groups_are_generated_and_not_trained() -> None:
    settings = core_settings(max_staleness=2, steps=60, max_new_tokens=64)
    found = steps(workload(settings=settings, dropped_fraction=0.5))
    generated = sum(step.generated_tokens for step in found)
    assert generated > 1.6 * sum(step.trained_tokens for step in found)


def test_same_seed_repeats_the_run() -> None:
    assert steps(workload(UNEQUAL, 2)) == steps(workload(UNEQUAL, 2))
    assert steps(workload(UNEQUAL, 2)) != steps(workload(UNEQUAL, 2, seed=2))
