"""Metrics of reward functions and workflows: accepted values, and the means of a step."""

from __future__ import annotations

import logging
import math

import pytest
from core_builders import core_settings, join_workers, make_core, make_sample, messages_of

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.journal.events import AnyEvent, SampleScored
from megatron_async_rl.controller.monitoring.score_monitor import ScoreMonitor
from megatron_async_rl.protocol.messages import Generated, ScoreRequest, ScoreResult
from megatron_async_rl.protocol.types import Segment
from megatron_async_rl.protocol.user_metrics import MAX_NAMES, MetricFilter, are_valid
from megatron_async_rl.protocol.wire import Codec
from megatron_async_rl.rollout.workflow import Completion, Episode


def test_wrong_metrics_are_left_out_with_one_warning_per_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = MetricFilter(logging.getLogger("test"))
    for _ in range(3):
        found = metrics.valid(
            {"format": True, "lines": 7, "nan": math.nan, "infinite": math.inf, "text": "1",
             "a b": 1.0, "": 1.0, 5: 1.0, "x" * 65: 1.0, "huge": 10**400}
        )  # fmt: skip
        assert found == {"format": 1.0, "lines": 7.0}
    assert len(caplog.records) == 8
    assert "metric 'nan' = nan is left out: a metric has a name of a letter" in caplog.text
    many = {f"m{number:03}": float(number) for number in range(100)}
    assert len(metrics.valid(many)) == MAX_NAMES and are_valid(metrics.valid(many))
    assert not are_valid(many) and not are_valid({"nan": math.nan})


def test_workflow_attaches_metrics_to_its_sample() -> None:
    episode = Episode(make_sample(0).ids)
    episode.add_turn(Completion([Segment(0, [1], [-0.5])], "stop"))
    episode.metrics["tries"] = 3.0
    assert episode.sample("stop", "1").metrics == {"tries": 3.0}


def scored_step(core: Core, monitor: ScoreMonitor) -> list[AnyEvent]:
    """Returns and scores all samples of the leased groups; returns the journal's events."""
    events: list[AnyEvent] = []

    def handle(worker: str, message: Generated | ScoreResult) -> list[ScoreRequest]:
        followed = core.handle(inputs.Received(worker, message), 0)
        for event in core.state.take_events():
            monitor.saw(event)
            events.append(event)
        return messages_of(followed, ScoreRequest)

    for lease in join_workers(core, capacity=4):
        for index in lease.indices:
            sample = make_sample(0)
            sample.metrics["tries"] = float(index)
            for request in handle("rollout-0", Generated(lease.key(index), sample)):
                metrics = {"format": 1.0} if index else {}
                handle("reward-0", ScoreResult(request.key, float(index), metrics=metrics))
    return events


def test_means_of_a_step_are_shown_by_name_and_journaled() -> None:
    core = make_core()
    monitor = ScoreMonitor(core_settings().samples_per_prompt, 9)
    events = scored_step(core, monitor)
    stats = monitor.step()
    assert stats["user/tries"] == 0.5  # of samples 0 and 1
    assert stats["user/format"] == 1.0  # of the samples that have it
    assert not any(tag.startswith("user/") for tag in monitor.step())
    codec = Codec(AnyEvent)
    again = ScoreMonitor(core_settings().samples_per_prompt, 9)
    for event in events:
        again.saw(codec.decode(codec.encode(event)))
    assert again.step()["user/format"] == 1.0


def test_number_of_names_in_a_run_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    monitor = ScoreMonitor(1, 9)
    for number in range(200):
        monitor.saw(SampleScored(number, 0, 1.0, {f"name{number}": 1.0}))
    assert sum(tag.startswith("user/") for tag in monitor.step()) == MAX_NAMES
    assert "more than 32 names in this run" in caplog.text
