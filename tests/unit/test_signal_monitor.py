"""A run that cannot learn is warned of early, and ends after a bounded number of groups."""

from __future__ import annotations

import pytest
from config_builders import config_tree

from megatron_async_rl.config import load
from megatron_async_rl.controller.journal.events import BatchSelected, GroupDropped, SampleScored
from megatron_async_rl.controller.monitoring.signal_monitor import SignalMonitor
from megatron_async_rl.errors import Error

LIMIT = 64


def make_monitor(**changes: object) -> SignalMonitor:
    settings = {"faults.max_filtered_groups": LIMIT} | changes
    return SignalMonitor(load.from_tree(config_tree(**settings)))


def drop(monitor: SignalMonitor, group_id: int, reason: str, reward: float = 1.0) -> None:
    for index in range(2):
        monitor.saw(SampleScored(group_id, index, reward))
    monitor.saw(GroupDropped(group_id, reason))


def test_run_in_which_no_group_passes_the_filters_is_warned_of_and_ends() -> None:
    monitor, warnings = make_monitor(), list[str]()
    for group_id in range(LIMIT - 1):
        drop(monitor, group_id, "success_rate" if group_id % 4 == 0 else "equal_rewards")
        monitor.check(0, 0.1 * group_id, warnings.append)
    [warning] = warnings
    assert "dropped 4 groups in a row (equal_rewards 75%, success_rate 25%; mean reward 1.000)" in (
        warning
    )
    assert "the run ends at 64 in a row (faults.max_filtered_groups)" in warning
    drop(monitor, LIMIT, "equal_rewards")
    with pytest.raises(Error, match=r"64 groups in a row .*never train .*max_filtered_groups = 64"):
        monitor.check(0, 100.0, warnings.append)


@pytest.mark.parametrize("passed", ["waits for a batch", "is in a batch"])
def test_group_that_passes_begins_the_count_again(passed: str) -> None:
    monitor, warnings = make_monitor(), list[str]()
    for round_ in range(3):
        for group_id in range(LIMIT - 1):
            drop(monitor, group_id, "equal_rewards")
            monitor.check(round_, 0.0, warnings.append)
        if passed == "is in a batch":
            monitor.saw(BatchSelected(round_, [LIMIT]))
            monitor.check(round_, 0.0, warnings.append)
    assert len(warnings) == 3


def test_slow_groups_are_warned_of_by_time() -> None:
    monitor, warnings = make_monitor(**{"faults.max_filtered_groups": 1024}), list[str]()
    for group_id in range(9):
        drop(monitor, group_id, "filtered", 0.0)
        monitor.check(0, 20.0 * group_id, warnings.append)
    assert len(warnings) == 1 and "(filtered 100%; mean reward 0.000)" in warnings[0]


def test_stale_and_failed_groups_are_not_filtered() -> None:
    monitor, warnings = make_monitor(), list[str]()
    for group_id in range(LIMIT + 1):
        drop(monitor, group_id, "stale" if group_id % 2 else "poison")
        monitor.check(0, 0.0, warnings.append)
    assert warnings == []


@pytest.mark.parametrize(
    ("estimator", "stats", "warned"),
    [
        ("grpo", {"reward/group_std_mean": 0.0, "reward/all_std": 0.5}, True),
        ("rloo", {"reward/group_std_mean": 1e-17, "reward/all_std": 0.5}, True),
        ("grpo", {"reward/group_std_mean": 0.1, "reward/all_std": 0.5}, False),
        ("reinforce_pp", {"reward/group_std_mean": 0.0, "reward/all_std": 0.5}, False),
        ("reinforce_pp", {"reward/group_std_mean": 0.0, "reward/all_std": 0.0}, True),
        ("gae", {"reward/group_std_mean": 0.0, "reward/all_std": 0.0}, False),
        ("mine:centered", {"reward/group_std_mean": 0.0, "reward/all_std": 0.0}, True),
        ("mine:centered", {"reward/group_std_mean": 0.0, "reward/all_std": 0.5}, False),
        ("grpo", {}, False),
    ],
)
def test_steps_without_learning_signal_are_warned_of_once(
    estimator: str, stats: dict[str, float], warned: bool
) -> None:
    monitor, warnings = make_monitor(**{"algorithm.advantage.estimator": estimator}), list[str]()
    for step in range(6):
        monitor.check_step(stats | {"reward/all_mean": 0.0}, warnings.append)
        assert len(warnings) == (warned and step >= 2)
