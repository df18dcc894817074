"""Rewards before filters drop groups: over all groups that were scored since the last step."""

from __future__ import annotations

import pytest

from megatron_async_rl.controller.core.events import BatchSelected, GroupDropped, SampleScored
from megatron_async_rl.controller.score_monitor import ScoreMonitor
from megatron_async_rl.protocol.messages import ScoreResult
from megatron_async_rl.protocol.types import SampleKey


def score(monitor: ScoreMonitor, group_id: int, *rewards: float) -> None:
    for index, reward in enumerate(rewards):
        monitor.saw(SampleScored(group_id, index, reward))


def test_groups_that_a_filter_drops_are_counted() -> None:
    monitor = ScoreMonitor(2)
    score(monitor, 0, 1.0, 1.0)
    monitor.saw(GroupDropped(0, "equal_rewards"))
    score(monitor, 1, 1.0, 1.0)
    score(monitor, 2, 0.0, 0.0)
    score(monitor, 3, 1.0, 0.0)
    stats = monitor.step()
    assert stats["reward/all_mean"] == 5 / 8
    assert stats["reward/all_right_fraction"] == 0.5
    assert stats["reward/all_wrong_fraction"] == 0.25
    assert stats["reward/group_std_mean"] == 0.125
    assert stats["reward/scored_groups"] == 4


def test_group_counts_in_the_step_in_which_it_is_complete() -> None:
    monitor = ScoreMonitor(2)
    score(monitor, 0, 1.0)
    assert "reward/all_mean" not in monitor.step()
    monitor.saw(SampleScored(0, 1, 0.0))
    assert monitor.step()["reward/all_mean"] == 0.5
    assert "reward/all_mean" not in monitor.step()


def test_group_that_can_never_be_complete_is_forgotten() -> None:
    monitor = ScoreMonitor(2)
    score(monitor, 0, 1.0)
    monitor.saw(GroupDropped(0, "stale"))
    score(monitor, 1, 1.0)  # its other sample was scored before the controller restarted
    monitor.saw(BatchSelected(0, [1]))
    assert monitor._open == {}


def test_errors_and_seconds_of_scoring_are_of_the_step() -> None:
    monitor, key = ScoreMonitor(2), SampleKey(1, 0, 1, 0)
    monitor.received(ScoreResult(key, 1.0, seconds=0.5))
    monitor.received(ScoreResult(key, 0.0, seconds=1.5))
    monitor.received(ScoreResult(key, None, "the server is down", seconds=9.0))
    stats = monitor.step()
    assert stats["reward/scoring_errors"] == 1
    assert (stats["reward/scoring_s_mean"], stats["reward/scoring_s_max"]) == (
        pytest.approx(1.0),
        1.5,
    )
    assert monitor.step() == {"reward/scoring_errors": 0}
