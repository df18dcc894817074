"""The mismatch probe: which tokens are compared, the figures, and the alarm."""

from __future__ import annotations

import numpy as np
import pytest
from config_builders import config_tree
from run_log_builders import sample_of_versions

from megatron_async_rl.config.load import from_tree
from megatron_async_rl.controller.core.fleet import RolloutWorker, ServerState
from megatron_async_rl.controller.delivery import train_samples
from megatron_async_rl.controller.monitoring.mismatch import MismatchMonitor
from megatron_async_rl.protocol.messages import ProbeRequest, ProbeResult, StepDone
from megatron_async_rl.protocol.types import PROBE_TOKENS, TrainSample

VERSION = 7


def monitor(**settings: object) -> MismatchMonitor:
    return MismatchMonitor(from_tree(config_tree(**settings)))


def server(
    name: str, version: int = VERSION, state: ServerState = ServerState.SERVING
) -> RolloutWorker:
    worker = RolloutWorker(name, 8, 0.0)
    worker.version, worker.state = version, state
    return worker


def batch() -> list[TrainSample]:
    """Eight samples of old versions, all generated before the weights under training existed."""
    lengths = [3, 40, 300, 1000, 2, 256, 257, 700]
    return [
        train_samples(sample_of_versions((2, n // 2), (3, n - n // 2)), 1.0)[0] for n in lengths
    ]


def chosen(probe: MismatchMonitor) -> tuple[list[TrainSample], ProbeRequest]:
    samples = batch()
    found = probe.choose(VERSION, samples, [server("rollout-0")])
    assert found
    return samples, found[1]


def logprobs_of(
    samples: list[TrainSample], request: ProbeRequest, shift: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logprobs that engine and trainer give for the tokens of the probe."""
    engine = np.full(len(request.windows) * PROBE_TOKENS, np.nan, np.float32)
    trainer = engine.copy()
    for index, window in enumerate(request.windows):
        count, at = len(window.ids) - window.start, index * PROBE_TOKENS
        engine[at : at + count] = np.linspace(-3, -0.1, count)
    for sample in samples:
        slots = sample.probe_slots()
        trainer[slots[slots > 0] - 1] = engine[slots[slots > 0] - 1] + shift
    return engine, trainer


def test_engine_and_trainer_are_asked_for_the_same_tokens() -> None:
    samples, request = chosen(monitor())
    probed = sorted((s for s in samples if s.probe_index >= 0), key=lambda s: s.probe_index)
    assert len(probed) == len(request.windows) == 4
    for sample, window in zip(probed, request.windows, strict=True):
        slots = sample.probe_slots()
        places = np.flatnonzero(slots)
        assert places[0] == window.start >= 3  # after the prompt
        assert places[-1] == len(window.ids) - 1 and len(places) <= PROBE_TOKENS
        assert window.ids.tolist() == sample.ids[: len(window.ids)].tolist()
        assert slots[places[0]] == sample.probe_index * PROBE_TOKENS + 1
        assert (np.diff(slots[places]) == 1).all()


def test_only_a_server_of_the_trained_version_is_asked() -> None:
    probe = monitor()
    others = [server("rollout-0", VERSION - 1), server("rollout-1", VERSION, ServerState.UPDATING)]
    samples = batch()
    assert probe.choose(VERSION, samples, others) is None
    assert all(sample.probe_index < 0 for sample in samples)
    current = [server(f"rollout-{n}") for n in (2, 3)]
    asked = [probe.choose(VERSION, batch(), [*others, *current]), None]
    for worker in current:
        worker.version = VERSION + 1
    asked[1] = probe.choose(VERSION + 1, batch(), current)
    assert {found[0] for found in asked if found} == {"rollout-2", "rollout-3"}  # in turn


@pytest.mark.parametrize(
    "settings", [{"rollout.temperature": 0.7}, {"monitor.mismatch_probe_samples": 0}]
)
def test_no_probe_where_nothing_can_be_compared(settings: dict[str, object]) -> None:
    assert monitor(**settings).choose(VERSION, batch(), [server("rollout-0")]) is None


def test_step_without_a_complete_probe_has_no_figures() -> None:
    probe = monitor()
    samples, request = chosen(probe)
    engine, trainer = logprobs_of(samples, request, 0.0)
    probe.received(StepDone(VERSION + 1, {}, trainer))
    assert probe.step(VERSION) == {}  # an update came before the engine's answer
    probe.received(ProbeResult(VERSION - 1, engine))
    assert probe.step(VERSION) == {}
    probe.received(ProbeResult(VERSION, engine))
    probe.received(StepDone(VERSION + 1, {}, np.full_like(trainer, np.nan)))
    assert (
        probe.step(VERSION) == {}
    )  # all tokens were in later minibatches, without a proximal pass


@pytest.mark.parametrize(("shift", "is_heard"), [(0.0, False), (0.04, False), (-0.2, True)])
def test_planted_drift_sets_off_the_alarm(shift: float, is_heard: bool) -> None:
    probe, heard = monitor(), []
    samples, request = chosen(probe)
    engine, trainer = logprobs_of(samples, request, shift)
    probe.received(ProbeResult(VERSION, engine))
    probe.received(StepDone(VERSION + 1, {}, trainer))
    stats = probe.step(VERSION)
    assert stats["probe/logprob_diff_mean"] == pytest.approx(abs(shift), abs=1e-6)
    assert stats["probe/logprob_diff_max"] == pytest.approx(abs(shift), abs=1e-6)
    assert stats["probe/mismatch_kl"] == pytest.approx(np.exp(shift) - shift - 1, abs=1e-6)
    assert stats["probe/tokens"] == sum(len(w.ids) - w.start for w in request.windows)
    probe.check(VERSION + 1, stats, heard.append)
    assert bool(heard) == is_heard
    if is_heard:
        assert (
            "training step 8: engine and trainer differ by 0.2 a token on the mismatch" in heard[0]
        )
        assert "monitor.logprob_mismatch_alarm = 0.05" in heard[0]


def test_alarm_reads_sampled_tokens_and_ignores_what_was_not_compared() -> None:
    heard: list[str] = []
    monitor().check(3, {"train/loss": 1.0}, heard.append)
    assert heard == []
    stats = {"train/logprob_diff_mean": 0.1, "train/logprob_diff_max": 0.3}
    monitor().check(3, stats, heard.append)
    assert "differ by 0.1 a token on the sampled tokens of staleness 0" in heard[0]
    monitor(**{"monitor.logprob_mismatch_alarm": None}).check(3, stats, heard.append)
    assert len(heard) == 1
