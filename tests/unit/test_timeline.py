"""The Chrome trace of a step: spans of all processes, loaded from the file."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_builders import make_sample

from megatron_async_rl.controller.monitoring.timeline import Timeline
from megatron_async_rl.protocol import messages as m
from megatron_async_rl.protocol import weight_messages as wm
from megatron_async_rl.protocol.types import Prompt, SampleKey

PROMPT = Prompt("p", np.arange(3, dtype=np.int32), {})
STATS = {"perf/time/proximal_s": 1.0, "perf/time/train_s": 3.0}


def lease(group_id: int) -> m.Generate:
    return m.Generate(1, group_id, 1, [0, 1], "train", PROMPT, 8, 1.0)


def key(group_id: int, index: int) -> SampleKey:
    return SampleKey(1, group_id, 1, index)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def run_step(timeline: Timeline, clock: list[float], version: int) -> None:
    """One step of 10 s: an update, two samples of which one is interrupted, scores, training."""
    script: list[tuple[float, str, str, Any]] = [
        (0.0, "<", "trainer-0", m.GetBatch(version)),
        (0.0, ">", "rollout-0", lease(version)),
        (1.0, ">", "rollout-0", wm.UpdateWeights(version)),
        (1.0, ">", "trainer-0", wm.SendBuckets(version)),
        (2.0, "<", "trainer-0", wm.BucketsSent(version, 0, {}, {"gather": 0.25, "wire": 0.5})),
        (2.0, "<", "rollout-0", wm.Updated(version, {"load": 0.5, "digest": 0.25, "resume": 0.25})),
        (3.0, "<", "rollout-0", m.Generated(key(version, 0), make_sample(0, 1))),
        (3.0, ">", "reward-0", m.ScoreRequest(key(version, 0), "1")),
        (3.5, "<", "reward-0", m.ScoreResult(key(version, 0), 1.0, seconds=0.4)),
        (4.0, "<", "rollout-0", m.Heartbeat(2, engine={"running_requests": 2.0})),
        (5.0, ">", "trainer-0", m.TrainBatch(version, [])),
        (10.0, "<", "trainer-0", m.StepDone(version + 1, STATS)),
    ]
    began = clock[0]
    for seconds, direction, worker, message in script:
        clock[0] = began + seconds
        (timeline.sent if direction == ">" else timeline.received)(worker, message)


def spans_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Loads a trace and returns the spans of each process, after checking their form."""
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    lane_names = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"
    }
    found = defaultdict(list)
    lanes = defaultdict(list)
    for event in events:
        assert event["ph"] in "MXC"
        if event["ph"] == "X":
            assert event["dur"] >= 0
            found[names[event["pid"]]].append(event)
            lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert lane_names.keys() == lanes.keys() and not names.keys() & {tid for _, tid in lanes}
    for spans in lanes.values():  # on a lane, spans follow each other or are nested
        for a, b in spans:
            assert not [1 for c, d in spans if a < c < b - 1 and d > b + 1]
    return found


def test_trace_of_a_step_has_all_processes(tmp_path: Path, clock: list[float]) -> None:
    timeline = Timeline(tmp_path, (1, 3))
    timeline.begin(0)
    for version in range(4):
        run_step(timeline, clock, version)
    assert sorted(path.name for path in (tmp_path / "trace").iterdir()) == ["v1.json", "v3.json"]
    found = spans_of(tmp_path / "trace" / "v1.json")
    seconds = {
        worker: {e["name"]: (e["ts"] / 1e6 - 110, e["dur"] / 1e6) for e in events}
        for worker, events in found.items()
    }
    assert seconds["trainer-0"] == {
        "wait for batch of v1": (0, 5),
        "send v1": (1, 1), "gather": (1.25, 0.25), "wire": (1.5, 0.5),
        "step on v1": (5, 5), "proximal": (6, 1), "train": (7, 3),
    }  # fmt: skip
    assert seconds["reward-0"] == {"reward 1.0": (3, 0.5)}
    rollout = seconds["rollout-0"]
    assert rollout["generate 1.0"] == (0, 3)
    assert rollout["update to v1"] == (1, 1) and rollout["resume"] == (1.75, 0.25)
    assert rollout["generate 1.1"] == (0, 10)  # not returned yet
    unfinished = [e["name"] for e in found["rollout-0"] if e["args"].get("unfinished")]
    assert unfinished == ["generate 0.1", "generate 1.1"]
    generated = next(e for e in found["rollout-0"] if e["name"] == "generate 1.0")
    assert generated["args"]["versions"] == [[0, 1], [1, 1]]


def test_nothing_is_kept_without_steps_to_trace(tmp_path: Path, clock: list[float]) -> None:
    timeline = Timeline(tmp_path, (0,))
    timeline.begin(4)  # a resumed run is past the step
    run_step(timeline, clock, 4)
    assert not timeline._open and not timeline._events and not (tmp_path / "trace").exists()
