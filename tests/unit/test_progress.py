"""Figures of a run: tags that TensorBoard sorts by area, and the worst staleness so far."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import numpy as np
import pytest
from run_log_builders import log_config, read_tensorboard, sample_of_versions

from megatron_async_rl.controller.core.actions import SendBatch
from megatron_async_rl.controller.core.fleet import Fleet
from megatron_async_rl.controller.core.groups import Group
from megatron_async_rl.controller.journal.events import AnyEvent, StepReported
from megatron_async_rl.controller.monitoring.progress import Progress
from megatron_async_rl.controller.weight_sync.session import Outcome
from megatron_async_rl.observability import panel
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.observability.status import EvaluationResult, read_status
from megatron_async_rl.protocol.types import Prompt
from megatron_async_rl.protocol.wire import Codec

TAG = re.compile(r"(reward|rollout|staleness|train|perf|sync|eval|ledger|drops)(/[a-z0-9_]+)+")
KINDS = ("stale", "filtered", "failed")
STATS = {
    "train/loss": 0.1,
    "train/tokens": 100.0,
    "perf/time/proximal_s": 0.3,
    "perf/time/train_s": 0.5,
}


def select_batch(
    progress: Progress,
    version: int,
    *runs: tuple[int, int],
    waited_s: float = 0.1,
    reward: float = 1.0,
) -> StepReported:
    group = Group(
        version,
        Prompt("p", np.arange(3, dtype=np.int32), {}),
        "train",
        [sample_of_versions(*runs)],
        [1.0],
    )
    batch, rewards = SendBatch(version, [group], frozenset({0})), np.full((1, 1), reward)
    progress.batch_selected(batch, rewards, np.zeros((1, 1)), waited_s=waited_s)
    return progress.step_done(version + 1, STATS)


def test_throughput_is_tokens_since_the_last_step_over_its_wall_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    config = log_config(tmp_path)
    log = RunLog(tmp_path, config)
    progress = Progress(log, config)
    progress.begin_training()
    clock[0] = 1.0  # samples return early in a step of 40 s
    for _ in range(3):
        progress.generated(sample_of_versions((0, 40)))
    clock[0] = 40.0
    select_batch(progress, 0, (0, 5), waited_s=10.0)
    clock[0] = 50.0  # a step of 10 s, in which no sample returned
    select_batch(progress, 1, (0, 5), waited_s=1.0)
    progress.write(Fleet())
    log.close()
    board = read_tensorboard(tmp_path)

    def values(tag: str) -> list[float]:
        return [event.value for event in board.Scalars(f"perf/{tag}")]

    assert values("generate_tokens_per_s") == [3.0, 0.0]
    assert values("train_tokens_per_s") == [2.5, 10.0]
    assert values("trainer_busy_tokens_per_s") == [125.0, 125.0]
    assert values("time/wait_for_batch_s") == [10.0, 1.0]
    status = read_status(tmp_path)
    assert (status.train_wait_fraction, status.train_tokens_per_s) == (0.1, 10.0)


def test_generated_tokens_are_shown_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    config = log_config(tmp_path, loggers=[])
    log = RunLog(tmp_path, config)
    progress = Progress(log, config)
    progress.begin_training()
    progress.generated(sample_of_versions((0, 40)))
    clock[0] = 20.0
    progress.write(Fleet())
    log.close()
    assert read_status(tmp_path).generate_tokens_per_s == 2.0


def test_worst_staleness_of_the_run_is_kept(tmp_path: Path) -> None:
    config = log_config(tmp_path, loggers=[])
    log = RunLog(tmp_path, config)
    progress = Progress(log, config)
    progress.begin_training()
    shown = []
    for version, runs in ((4, [(1, 5), (4, 15)]), (5, [(5, 8)]), (6, [(4, 1), (6, 1)])):
        select_batch(progress, version, *runs)
        progress.write(Fleet())
        status = read_status(tmp_path)
        shown.append((status.staleness_mean, status.staleness_max, status.staleness_worst))
    log.close()
    assert shown == [(0.75, 3, 3), (0.0, 0, 3), (1.0, 2, 3)]
    log = RunLog(tmp_path, config)  # the controller restarts
    progress = Progress(log, config)
    progress.begin_training()
    select_batch(progress, 7, (6, 1))
    progress.write(Fleet())
    log.close()
    assert (read_status(tmp_path).staleness_max, read_status(tmp_path).staleness_worst) == (1, 3)


def test_display_continues_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    config = log_config(tmp_path, loggers=[])
    log = RunLog(tmp_path, config)
    progress = Progress(log, config)
    progress.begin_training()
    events = []
    for version, reward in enumerate((0.25, 0.5, 0.75)):
        clock[0] += 20.0
        events.append(select_batch(progress, version, (0, 5), reward=reward))
    fleet = Fleet()
    fleet.join_rollout("rollout-0", 8, 0.0)
    progress.write(fleet)
    before = read_status(tmp_path)
    assert (before.eta_s, before.reward_history) == (140.0, [0.25, 0.5, 0.75])
    log.close()

    codec = Codec(AnyEvent)
    log = RunLog(tmp_path, config)
    progress = Progress(log, config)  # the next controller, with the events of the journal
    for event in events:
        progress.restore(codec.decode(codec.encode(event)))
    progress.resumed(3, {"admitted": 3, "trained": 3, "pending": 0}, [])
    progress.begin_training()
    clock[0] += 1.0
    progress.write(Fleet())
    log.close()
    after = read_status(tmp_path)
    assert (after.eta_s, after.reward_history) == (before.eta_s, before.reward_history)
    assert [(server.name, server.state) for server in after.fleet] == [
        ("rollout-0", "not connected")
    ]
    text = panel.summary(after) + panel.log_line(after)
    assert "reward      0.250 in the first step" in text and "2:20 left" in text


def test_batch_in_training_at_a_restart_is_shown(tmp_path: Path) -> None:
    config = log_config(tmp_path, loggers=[])
    log = RunLog(tmp_path, config)
    progress = Progress(log, config)
    group = Group(0, Prompt("p", np.arange(3, dtype=np.int32), {}), "train",
                  [sample_of_versions((2, 4))], [0.5])  # fmt: skip
    progress.resumed(3, {}, [group])
    progress.begin_training()
    assert progress.step_done(4, STATS).reward_mean == 0.5
    progress.write(Fleet())
    log.close()
    assert (read_status(tmp_path).staleness_max, read_status(tmp_path).reward_history) == (1, [0.5])


def test_drops_are_counted_and_the_first_of_each_reason_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = log_config(tmp_path)
    log = RunLog(tmp_path, config)
    progress = Progress(log, config)
    progress.begin_training()
    for version in range(2):
        for number in range(50):
            progress.dropped(100 * version + number, "equal_rewards")
        progress.dropped(100 * version + 99, "stale")
        select_batch(progress, version, (version, 5))
    log.close()
    first = [record.message for record in caplog.records if record.message.startswith("group")]
    assert first == [
        "group 0 dropped: equal_rewards; more are counted at each step",
        "group 99 dropped: stale; more are counted at each step",
    ]
    assert caplog.text.count("dropped since the last step: 50 equal_rewards, 1 stale;") == 2
    board = read_tensorboard(tmp_path)
    counts = {kind: board.Scalars(f"drops/{kind}_groups")[1].value for kind in KINDS}
    assert counts == {"stale": 1, "filtered": 50, "failed": 0}


def test_every_scalar_tag_is_area_and_name(tmp_path: Path) -> None:
    config = log_config(tmp_path)
    log = RunLog(tmp_path, config)
    progress = Progress(log, config)
    progress.begin_training()
    progress.ledger = {"admitted": 3, "trained": 1, "dropped.stale": 1, "pending": 1}
    progress.published(Outcome(1, ["rollout-0"], seconds={"wire": 0.1, "total": 0.2}))
    select_batch(progress, 1, (0, 5))
    progress.evaluated(1, [EvaluationResult(1, "aime", {"accuracy": 0.5, "problems": 10.0})])
    log.close()
    tags = read_tensorboard(tmp_path).Tags()
    names = [*tags["scalars"], *tags["histograms"]]
    assert [name for name in names if not TAG.fullmatch(name)] == []
    assert {
        "ledger/dropped_stale",
        "sync/wire_s",
        "eval/aime/accuracy",
        "perf/time/step_s",
        "staleness/max",
    } <= set(names)
