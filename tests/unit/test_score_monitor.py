"""Rewards before filters drop groups: over all groups that were scored since the last step."""

from __future__ import annotations

import logging

import pytest

from megatron_async_rl.controller.journal.events import BatchSelected, GroupDropped, SampleScored
from megatron_async_rl.controller.monitoring.score_monitor import ScoreMonitor
from megatron_async_rl.errors import Error
from megatron_async_rl.observability.error_log import ErrorLog, user_error
from megatron_async_rl.protocol.messages import GenerateFailed, ScoreResult
from megatron_async_rl.protocol.types import SampleKey


def score(monitor: ScoreMonitor, group_id: int, *rewards: float) -> None:
    for index, reward in enumerate(rewards):
        monitor.saw(SampleScored(group_id, index, reward))


def test_groups_that_a_filter_drops_are_counted() -> None:
    monitor = ScoreMonitor(2, 3)
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
    monitor = ScoreMonitor(2, 3)
    score(monitor, 0, 1.0)
    assert "reward/all_mean" not in monitor.step()
    monitor.saw(SampleScored(0, 1, 0.0))
    assert monitor.step()["reward/all_mean"] == 0.5
    assert "reward/all_mean" not in monitor.step()


def test_group_that_can_never_be_complete_is_forgotten() -> None:
    monitor = ScoreMonitor(2, 3)
    score(monitor, 0, 1.0)
    monitor.saw(GroupDropped(0, "stale"))
    score(monitor, 1, 1.0)  # its other sample was scored before the controller restarted
    monitor.saw(BatchSelected(0, [1]))
    assert monitor._open == {}


def test_errors_and_seconds_of_scoring_are_of_the_step() -> None:
    monitor, key = ScoreMonitor(2, 3), SampleKey(1, 0, 1, 0)
    monitor.received("reward-0", ScoreResult(key, 1.0, seconds=0.5))
    monitor.received("reward-0", ScoreResult(key, 0.0, seconds=1.5))
    monitor.received("reward-0", ScoreResult(key, None, "the server is down"))
    stats = monitor.step()
    assert stats["reward/scoring_errors"] == 1
    assert (stats["reward/scoring_s_mean"], stats["reward/scoring_s_max"]) == (
        pytest.approx(1.0),
        1.5,
    )
    assert monitor.step() == {"reward/scoring_errors": 0}


def fail(monitor: ScoreMonitor, group_id: int, reason: str = "reward_unavailable") -> list[str]:
    """Returns the warnings."""
    warnings: list[str] = []
    monitor.saw(GroupDropped(group_id, reason))
    monitor.check(warnings.append)
    return warnings


def test_run_in_which_every_group_fails_ends_with_the_last_error() -> None:
    monitor = ScoreMonitor(2, 3)
    monitor.received("rollout-0", GenerateFailed(SampleKey(1, 2, 1, 0), "KeyError: 'answer'"))
    fail(monitor, 0)
    fail(monitor, 1, "poison")
    with pytest.raises(Error, match=r"3 groups in a row .* = 3\)(.|\n)*KeyError: 'answer'"):
        fail(monitor, 2, "generation_failed")


def test_first_failed_group_of_each_reason_is_warned_of_with_the_error() -> None:
    monitor = ScoreMonitor(2, 9)
    monitor.received("rollout-0", GenerateFailed(SampleKey(1, 2, 1, 0), "KeyError: 'a'\n  File"))
    [warning] = fail(monitor, 0, "generation_failed")
    assert "dropped as generation_failed" in warning
    assert "rollout-0: sample 2.0: KeyError: 'a' (logs/controller.log has" in warning
    assert fail(monitor, 1, "generation_failed") == fail(monitor, 2, "equal_rewards") == []
    assert len(fail(monitor, 3, "reward_unavailable")) == 1


def test_run_ends_with_the_reason_that_the_core_found() -> None:
    monitor = ScoreMonitor(2, 1)
    monitor.failed("reward-0: no score for sample 0.0", "the reward is nan")
    assert monitor.step()["reward/scoring_errors"] == 1
    with pytest.raises(Error, match="the reward is nan"):
        fail(monitor, 0)


def test_a_scored_group_or_a_drop_for_another_reason_does_not_count() -> None:
    monitor = ScoreMonitor(2, 3)
    for group_id in range(0, 20, 5):
        fail(monitor, group_id)
        fail(monitor, group_id + 1)
        fail(monitor, group_id + 2, "stale")
        score(monitor, group_id + 3, 1.0, 1.0)
        fail(monitor, group_id + 3, "equal_rewards")


def test_each_different_error_is_logged_once_with_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors = ErrorLog(logging.getLogger("test"))
    for number in range(1000):
        errors.log(f"group {number}", f"ValueError: row {number}\n  its traceback")
    errors.log("group 7", "KeyError: 'answer'")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "group 0: ValueError: row 0\n  its traceback"
    assert [line.partition("(")[2] for line in lines[1:-1]] == [
        "10 times so far)",
        "100 times so far)",
        "1000 times so far)",
    ]
    assert lines[-1] == "group 7: KeyError: 'answer'"


def test_error_text_has_the_users_traceback_alone() -> None:
    def of_the_user() -> None:
        raise KeyError("answer")

    try:
        of_the_user()
    except KeyError as e:
        text = user_error(e)
    assert text.startswith("KeyError: 'answer'\n") and "in of_the_user" in text
    assert "in test_error_text" not in text
