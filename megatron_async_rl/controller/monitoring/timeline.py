"""Writes the activity of all processes during a step as a Chrome trace: run.dir/trace/vN.json.

For the steps in `monitor.trace_steps`; https://ui.perfetto.dev shows it. The controller sees every
message, so that one clock times all spans: a sample from its lease to its return, a score, a
trainer's wait and step, a weight update. Durations that a worker measured itself (passes of a step,
phases of an update) end when its report arrived; those of a weight source are sums over its
buckets. A step's trace lasts from the report of the step before to its own.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from megatron_async_rl.protocol import messages, weight_messages
from megatron_async_rl.protocol.messages import Message

logger = logging.getLogger(__name__)
FOLDER = "trace"
# lanes of a process; those from 1 on are samples or scores
SIDE_LANE, OWN_LANE = -1, 0
LANE_NAMES = {SIDE_LANE: "weights sent, probe", OWN_LANE: "step, update"}
RECEIVER_PHASES = ("load", "flush", "digest", "resume")  # in their order
SOURCE_PHASES = ("gather", "trainer_digest", "wire")
PASSES = {"proximal": "perf/time/proximal_s", "train": "perf/time/train_s"}


@dataclass
class _Open:
    name: str
    lane: int
    began: float
    about: dict[str, Any]


class Timeline:
    """`begin` at the start of a controller; then every message that is sent or received."""

    def __init__(self, run_dir: Path, steps: tuple[int, ...]) -> None:
        self._folder = run_dir / FOLDER
        self._left = set(steps)
        self._version = 0
        self._open: defaultdict[str, dict[object, _Open]] = defaultdict(dict)  # by worker
        self._events: list[dict[str, Any]] = []
        self._numbers: dict[str, int] = {}  # worker -> process number of the trace

    def begin(self, version: int) -> None:
        """`version`: of the weights in training."""
        self._version = version
        self._left = {step for step in self._left if step >= version}

    def sent(self, worker: str, message: Message) -> None:
        if not self._left:
            return
        match message:
            case messages.Generate():
                about = {"purpose": message.purpose, "attempt": message.attempt}
                for index in message.indices:
                    key = message.key(index)
                    self._begin(worker, key, f"generate {key}", about)
            case messages.ScoreRequest():
                self._begin(worker, (message.key, message.call), f"reward {message.key}")
            case messages.ProbeRequest():
                self._begin(worker, "probe", "mismatch probe")
            case messages.TrainBatch():
                self._end(worker, "wait")
                about = {"samples": len(message.samples)}
                self._begin(worker, "own", f"step on v{message.version}", about)
            case weight_messages.UpdateWeights() | weight_messages.LoadSnapshot():
                self._begin(worker, "own", f"update to v{message.version}")
            case weight_messages.SendBuckets() | weight_messages.WriteSnapshot():
                self._begin(worker, "weights", f"send v{message.version}")

    def received(self, worker: str, message: object) -> None:
        if not self._left:
            return
        match message:
            case messages.Generated():
                sample = message.sample
                about = {"tokens": sample.num_generated, "versions": sample.version_runs()}
                self._end(worker, message.key, about | {"interrupts": sample.num_interrupts})
            case messages.GenerateFailed():
                self._end(worker, message.key, {"error": message.error[:200]})
            case messages.ScoreResult():
                about = {"reward": message.reward, "seconds": message.seconds}
                self._end(worker, (message.key, message.call), about)
            case messages.ProbeResult():
                self._end(worker, "probe")
            case messages.GetBatch():
                self._begin(worker, "wait", f"wait for batch of v{message.version}")
            case weight_messages.Updated():
                self._phases(worker, message.seconds, RECEIVER_PHASES, "own")
                self._end(worker, "own", {"error": message.error} if message.error else {})
            case weight_messages.BucketsSent() | weight_messages.SnapshotWritten():
                self._phases(worker, message.seconds, SOURCE_PHASES, "weights")
                self._end(worker, "weights")
            case messages.Heartbeat() if message.engine:
                counts = {
                    name: message.engine.get(f"{name}_requests", 0.0)
                    for name in ("running", "queued")
                }
                self._add("C", worker, "requests", time.monotonic(), args=counts)
            case messages.StepDone():
                passes = {name: message.stats.get(tag, 0.0) for name, tag in PASSES.items()}
                self._phases(worker, passes, tuple(PASSES), "own")
                for name in [name for name in self._open if name.startswith("trainer-")]:
                    self._end(name, "own")
                self._step_done(message.version)

    def _begin(
        self, worker: str, key: object, name: str, about: dict[str, Any] | None = None
    ) -> None:
        opened = self._open[worker]
        lane = OWN_LANE
        if not isinstance(key, str):
            taken = {span.lane for span in opened.values()}
            lane = next(n for n in range(1, len(taken) + 2) if n not in taken)
        elif key in ("weights", "probe"):
            lane = SIDE_LANE
        opened[key] = _Open(name, lane, time.monotonic(), about or {})

    def _end(self, worker: str, key: object, about: dict[str, Any] | None = None) -> None:
        if span := self._open[worker].pop(key, None):
            self._span(worker, span, time.monotonic(), about or {})

    def _phases(
        self, worker: str, seconds: dict[str, float], names: tuple[str, ...], key: str
    ) -> None:
        """Adds phases one after another within an open span; the last one ends now."""
        if not (whole := self._open[worker].get(key)):
            return
        end = time.monotonic()
        for name in reversed(names):
            began = max(whole.began, end - seconds.get(name, 0.0))
            if began < end:
                self._span(worker, _Open(name, whole.lane, began, {}), end, {})
            end = began

    def _span(self, worker: str, span: _Open, end: float, about: dict[str, Any]) -> None:
        duration_us = (end - span.began) * 1e6
        self._add(
            "X", worker, span.name, span.began,
            tid=span.lane + 2, dur=duration_us, args=span.about | about,
        )  # fmt: skip

    def _add(self, kind: str, worker: str, name: str, at: float, **more: Any) -> None:
        if self._version in self._left:
            # no process has the number of a lane, which a viewer would take for its main thread
            pid = self._numbers.setdefault(worker, 1000 * (len(self._numbers) + 1))
            event = {"ph": kind, "name": name, "pid": pid, "ts": at * 1e6, "tid": 0}
            self._events.append(event | more)

    def _step_done(self, version: int) -> None:
        if version <= self._version:
            return  # a trainer that repeats its steps
        if self._version in self._left:
            self._write()
        self.begin(version)

    def _write(self) -> None:
        now = time.monotonic()
        for worker, opened in self._open.items():
            for span in opened.values():
                self._span(worker, span, now, {"unfinished": True})
        names = [
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": worker}}
            for worker, pid in self._numbers.items()
        ]
        lanes = {(event["pid"], event["tid"]) for event in self._events if event["ph"] == "X"}
        for pid, tid in sorted(lanes):
            about = {"name": LANE_NAMES.get(tid - 2, "lane")}
            names.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": about})
        trace = {"traceEvents": names + self._events, "displayTimeUnit": "ms"}
        path = self._folder / f"v{self._version}.json"
        try:
            self._folder.mkdir(exist_ok=True)
            path.write_bytes(msgspec.json.encode(trace))
            logger.info("%s: %d events of the step on v%d", path, len(self._events), self._version)
        except OSError as e:
            logger.error("%s cannot be written: %s", path, e)
        self._events = []
