"""Measures at every step how much engine and trainer differ under the same weights.

Tokens of a batch were mostly sampled by older weights, so their logprobs do not reveal a fault. The
controller therefore uses a probe: it chooses a few windows of tokens of the batch trained on
version v, one server that serves v computes their logprobs by a prefill, and the trainer returns
its own under v (trainer/probe.py). No process waits for it; a step without a complete probe has no
figures.

The engine's logprobs of input tokens are those of temperature 1, so with another
rollout.temperature nothing can be compared but the sampled tokens of staleness 0, which the loss
compares (train/logprob_diff_mean).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.core.fleet import RolloutWorker
from megatron_async_rl.protocol.messages import (
    Message,
    ProbeRequest,
    ProbeResult,
    ProbeWindow,
    StepDone,
)
from megatron_async_rl.protocol.types import NOT_GENERATED, PROBE_TOKENS, TrainSample

_MEASURED = {  # the mean absolute difference -> how it is called in the warning
    "probe/logprob_diff_mean": "on the mismatch probe",
    "train/logprob_diff_mean": "on the sampled tokens of staleness 0",
}


class MismatchMonitor:
    def __init__(self, config: Config) -> None:
        is_comparable = config.has_trainer and config.rollout.temperature == 1.0
        self._num_samples = config.monitor.mismatch_probe_samples if is_comparable else 0
        self._alarm = config.monitor.logprob_mismatch_alarm
        self._cap = config.algorithm.staleness_correction.behavior_weight_cap
        self._seed = config.run.seed
        self._engine = self._trainer = (-1, np.empty(0, np.float32))  # version, logprobs

    def choose(
        self, version: int, samples: list[TrainSample], servers: Iterable[RolloutWorker]
    ) -> tuple[str, ProbeRequest] | None:
        """Marks samples of the batch; returns a server and its request, if one serves `version`.

        The servers that serve `version` take turns over the steps.
        """
        names = sorted(s.name for s in servers if s.is_serving and s.version == version)
        count = min(self._num_samples, len(samples))
        if not count or not names:
            return None
        random = np.random.default_rng((self._seed, version))
        windows: list[ProbeWindow] = []
        for number in random.choice(len(samples), count, replace=False):
            sample = samples[number]
            generated = np.flatnonzero(sample.versions != NOT_GENERATED)
            if not generated.size:
                continue  # padding of a batch
            first, end = int(generated[0]), int(generated[-1]) + 1
            start = int(random.integers(first, max(first, end - PROBE_TOKENS) + 1))
            samples[number] = msgspec.structs.replace(
                sample, probe_index=len(windows), probe_start=start
            )
            windows.append(ProbeWindow(sample.ids[: min(end, start + PROBE_TOKENS)], start))
        return names[version % len(names)], ProbeRequest(version, windows)

    def received(self, message: Message) -> None:
        """Keeps the logprobs that a message has."""
        if isinstance(message, ProbeResult):
            self._engine = message.version, message.probe_logprobs
        elif isinstance(message, StepDone):
            self._trainer = message.version - 1, message.probe_logprobs

    def step(self, version: int) -> dict[str, float]:
        """Returns the figures of the step that trained on `version`; none if not compared."""
        (of_engine, engine), (of_trainer, trainer) = self._engine, self._trainer
        size = min(len(engine), len(trainer))
        if not of_engine == of_trainer == version or not size:
            return {}
        difference = trainer[:size].astype(np.float64) - engine[:size]
        difference = difference[np.isfinite(difference)]
        if not difference.size:
            return {}
        with np.errstate(over="ignore"):
            ratio = np.exp(difference)
        stats = {
            "probe/tokens": float(difference.size),
            "probe/logprob_diff_mean": float(np.abs(difference).mean()),
            "probe/logprob_diff_max": float(np.abs(difference).max()),
            "probe/mismatch_kl": float((ratio - difference - 1).mean()),
        }
        if self._cap is not None:
            stats["probe/beyond_cap_fraction"] = float((ratio > self._cap).mean())
        return stats

    def check(self, version: int, stats: dict[str, float], warn: Callable[[str], None]) -> None:
        """Warns if a mean difference of the step exceeds monitor.logprob_mismatch_alarm."""
        for tag, where in _MEASURED.items():
            if self._alarm is not None and stats.get(tag, 0.0) > self._alarm:
                largest = stats[tag.replace("_mean", "_max")]
                warn(
                    f"training step {version}: engine and trainer differ by {stats[tag]:.4g} a "
                    f"token {where} (mean absolute logprob difference under the same version), "
                    f"more than monitor.logprob_mismatch_alarm = {self._alarm:g}; largest "
                    f"{largest:.4g}"
                )
