"""All monitors of a run, called for messages, journal events and steps."""

from __future__ import annotations

import time

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.controller.journal.events import JournalEvent
from megatron_async_rl.controller.monitoring.engine_monitor import EngineMonitor
from megatron_async_rl.controller.monitoring.length_monitor import LengthMonitor
from megatron_async_rl.controller.monitoring.mismatch import MismatchMonitor
from megatron_async_rl.controller.monitoring.progress import Progress
from megatron_async_rl.controller.monitoring.score_monitor import ScoreMonitor
from megatron_async_rl.controller.monitoring.signal_monitor import SignalMonitor
from megatron_async_rl.protocol.messages import Message, ProbeResult


class Monitors:
    def __init__(self, config: Config, state: ControllerState, progress: Progress) -> None:
        self._state = state
        self._progress = progress
        self.mismatch = MismatchMonitor(config)
        self.engines = EngineMonitor()
        self.scores = ScoreMonitor(
            config.algorithm.samples_per_prompt, config.faults.max_failed_groups
        )
        self._lengths = LengthMonitor()
        self._signal = SignalMonitor(config)

    def received(self, worker: str, message: Message) -> None:
        self.scores.received(worker, message)
        self.mismatch.received(message)
        self.engines.received(worker, message)
        if isinstance(message, ProbeResult) and (stats := self.mismatch.step(message.version)):
            version = message.version + 1  # a step that is reported already
            self._progress.record(version, stats)
            self.mismatch.check(version, stats, self._progress.warn)

    def saw(self, recorded: list[JournalEvent]) -> None:
        """Takes the events of one change. Raises Error if the run can never train a step."""
        for event in recorded:
            self._lengths.saw(event)
            self.scores.saw(event)
            self._signal.saw(event)
        self.scores.check(self._progress.warn)
        self._signal.check(len(self._state.ready), time.monotonic(), self._progress.warn)

    def step(self, version: int, stats: dict[str, float]) -> dict[str, float]:
        """Returns the trainer's figures of the step to `version` with those of all monitors."""
        stats = stats | self._lengths.step() | self.scores.step()
        stats |= self.mismatch.step(version - 1) | self.engines.step()
        stats["rollout/expected_kv_tokens"] = self._state.lengths.running_tokens
        return stats

    def check_step(self, version: int, stats: dict[str, float]) -> None:
        """Warns of figures of a step that a person should act on."""
        self._lengths.check(self._progress.warn)
        self._signal.check_step(stats, self._progress.warn)
        self.mismatch.check(version, stats, self._progress.warn)
