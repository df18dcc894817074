"""Takes costs and lengths from the records of a run: TensorBoard, samples.jsonl, config.yaml.

A run measures its trainer and its weight updates itself. Decode costs are a straight line through
the steps' means of samples in flight and tokens/s of the servers, so they hold near the load of
that run. Prefill is the servers' busy time that decoding does not explain.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.config.load import load_run
from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.sample_log import SAMPLES_FILE, read_samples
from megatron_async_rl.planning.costs import Costs, DecodeCosts, PrefillCosts, TrainCosts
from megatron_async_rl.planning.lengths import Lengths
from megatron_async_rl.planning.predict import (
    MAX_SAMPLES,
    Load,
    Prediction,
    average,
    predict,
    workload_of,
)
from megatron_async_rl.planning.simulation import Simulation

WARM_UP_STEPS = 2  # kernels are compiled, update groups are made
LEAST_STEPS = 3  # after these
NO_LIMIT = 1e12  # tokens of a KV cache that was never used


@dataclass(frozen=True)
class Calibration:
    """Costs of a run, and its own measurements in the same steps."""

    config: Config
    costs: Costs
    load: Load
    step_s: float
    trained_tokens_per_s: float

    def costs_of(self, config: Config) -> Costs:
        """Returns the costs with another number of replicas of the same layout."""
        replicas = config.trainer.data_parallel_size
        return replace(self.costs, train=replace(self.costs.train, replicas=replicas))

    def predict_itself(self) -> Prediction:
        """Simulates the run from its first to its last step and averages the measured steps.

        Of a run of more than MAX_SAMPLES samples only some steps of a part, as `predict` does.
        """
        algorithm = self.config.algorithm
        step_samples = algorithm.prompts_per_step * algorithm.samples_per_prompt
        if self.config.run.steps * step_samples > MAX_SAMPLES:
            return predict(self.config, self.costs, self.load)
        steps = list(Simulation(workload_of(self.config, self.load), self.costs).steps())
        return average(steps[WARM_UP_STEPS:])


def read(run_dir: Path) -> Calibration:
    """Raises DataError if the run has too few steps or lacks a record."""
    for name in ("config.yaml", SAMPLES_FILE, "tensorboard"):
        if not (run_dir / name).exists():
            raise DataError(
                f"--calibrate = {run_dir} has no {name}", "give the run.dir of a run that trained"
            )
    config = load_run(run_dir)
    samples = list(read_samples(run_dir))
    if not samples:
        raise DataError(
            f"--calibrate = {run_dir}: {SAMPLES_FILE} has no samples", "give another run"
        )
    scalars = _Scalars(run_dir)
    prompt = np.array([line.num_prompt for line in samples], np.int64)
    response = np.array([line.num_generated for line in samples], np.int64)
    lengths = Lengths(prompt, response)
    trained_groups = len({line.group_id for line in samples})
    filtered_groups = sum(scalars.all("drops/filtered_groups", optional=True))
    recomputed = sum(_interrupted_tokens(line.num_prompt, line.versions) for line in samples)
    prefilled = prompt.sum() / config.algorithm.samples_per_prompt + recomputed
    prefilled_share = float(prefilled / response.sum())
    decode, prefill = _generation(scalars, config.rollout.servers, prefilled_share)
    step_s = scalars.counted("perf/time/step_s")
    trained = scalars.counted("train/tokens")
    score_s = scalars.counted("reward/scoring_s_mean", optional=True)
    return Calibration(
        config=config,
        costs=Costs(
            decode=decode,
            prefill=prefill,
            train=_train(scalars, config),
            update_s=statistics.fmean(scalars.counted("sync/total_s")),
            kv_tokens=_kv_tokens(scalars, config, lengths),
            score_s=statistics.fmean(score_s) if score_s else 0.0,
            between_steps_s=_between_steps_s(scalars),
        ),
        load=Load(lengths, filtered_groups / (filtered_groups + trained_groups)),
        step_s=statistics.fmean(step_s),
        trained_tokens_per_s=sum(trained) / sum(step_s),
    )


class _Scalars:
    """The TensorBoard scalars of a run."""

    def __init__(self, run_dir: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self._run_dir = run_dir
        self._events = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0}).Reload()
        self._tags = set(self._events.Tags()["scalars"])
        if (found := len(self.counted("perf/time/step_s"))) < LEAST_STEPS:
            raise DataError(
                f"--calibrate = {run_dir} has {found} steps after the first {WARM_UP_STEPS}, and "
                f"{LEAST_STEPS} are needed",
                "give a longer run",
            )

    def all(self, tag: str, first: int = 0, optional: bool = False) -> list[float]:
        """Returns the values from version `first` on. Raises DataError if the tag is missing."""
        if tag in self._tags:
            return [s.value for s in self._events.Scalars(tag) if s.step >= first]
        if optional:
            return []
        raise DataError(
            f"--calibrate = {self._run_dir} has no {tag} in TensorBoard",
            "give a run with monitor.loggers: [tensorboard] and an SGLang that reports its load "
            "(0.5.21)",
        )

    def counted(self, tag: str, optional: bool = False) -> list[float]:
        return self.all(tag, WARM_UP_STEPS + 1, optional)

    def aligned(self, *tags: str) -> list[np.ndarray]:
        """Returns each tag's values in the counted steps that have all of them.

        A step shorter than the time between heartbeats may have no figures of the servers.
        """
        found = [dict[int, float]() for _ in tags]
        for tag, values in zip(tags, found, strict=True):
            self.counted(tag)  # raises if the tag is missing
            values |= {s.step: s.value for s in self._events.Scalars(tag)}
        common = [n for n in sorted(set.intersection(*map(set, found))) if n > WARM_UP_STEPS]
        return [np.array([values[step] for step in common]) for values in found]


def _generation(
    scalars: _Scalars, servers: int, prefilled_share: float
) -> tuple[DecodeCosts, PrefillCosts]:
    """Returns the costs of decoding and prefill; `prefilled_share`: of the generated tokens.

    On a CPU SGLang reports no rate of decoding. It is then that of all busy time, prefill included.
    """
    step_s, idle, generated_per_s, running, rates = scalars.aligned(
        "perf/time/step_s",
        "perf/engine_idle_fraction",
        "perf/generate_tokens_per_s",
        "engine/running_requests",
        "engine/decode_tokens_per_s",
    )
    busy_s, generated = step_s * (1 - idle), step_s * generated_per_s
    is_reported = bool(rates.any())
    if not is_reported:
        rates = np.divide(generated, busy_s, out=np.zeros_like(busy_s), where=busy_s > 0)
    used = (running > 0) & (rates > 0)
    if not used.any():
        raise DataError(
            "the servers of the run in --calibrate reported no running samples", "give a longer run"
        )
    step_seconds = running[used] / rates[used]
    decode = _straight_line(running[used] / servers, step_seconds, step_s[used])
    if not is_reported:
        return decode, PrefillCosts(0.0)
    decode_s = generated.sum() / np.average(rates[used], weights=step_s[used])
    prefill_s = servers * max(0.0, busy_s.sum() - decode_s)
    return decode, PrefillCosts(float(prefill_s / (prefilled_share * generated.sum())))


def _straight_line(running: np.ndarray, seconds: np.ndarray, weights: np.ndarray) -> DecodeCosts:
    """Fits seconds of a decode step = a + b * running samples, neither negative."""
    mean, mean_s = np.average(running, weights=weights), np.average(seconds, weights=weights)
    spread = np.average((running - mean) ** 2, weights=weights)
    slope = 0.0
    if spread > 0:
        slope = np.average((running - mean) * (seconds - mean_s), weights=weights) / spread
    slope = min(max(slope, 0.0), mean_s / mean)
    return DecodeCosts(float(mean_s - slope * mean), float(slope), 0.0)


def _train(scalars: _Scalars, config: Config) -> TrainCosts:
    train_s = sum(scalars.counted("perf/time/train_s"))
    proximal_s = sum(scalars.counted("perf/time/proximal_s"))
    tokens = sum(scalars.counted("train/packed_tokens"))
    replicas = config.trainer.data_parallel_size
    return TrainCosts(
        token_s=train_s * replicas / tokens,
        forward_passes=3 * proximal_s / train_s,
        replicas=replicas,
    )


def _between_steps_s(scalars: _Scalars) -> float:
    """Returns the mean seconds of a step without waiting, training and the update."""
    parts = ("wait_for_batch_s", "proximal_s", "train_s")
    known = sum(sum(scalars.counted(f"perf/time/{part}")) for part in parts)
    steps = scalars.counted("perf/time/step_s")
    return max(0.0, (sum(steps) - known) / len(steps) - _mean(scalars.counted("sync/total_s")))


def _kv_tokens(scalars: _Scalars, config: Config, lengths: Lengths) -> float:
    """Returns the KV cache of a server: as set, or from its use by the samples in flight."""
    if isinstance(limit := config.sglang.get("max_total_tokens"), int):
        return float(limit)
    use = _mean(scalars.counted("engine/kv_use_fraction"))
    running = _mean(scalars.counted("engine/running_requests")) / config.rollout.servers
    return running * lengths.mean_context / use if use > 0 else NO_LIMIT


def _interrupted_tokens(num_prompt: int, versions: list[list[int]]) -> int:
    """Returns the tokens that a sample's weight updates made the engine prefill again."""
    counts = itertools.accumulate(count for _, count in versions[:-1])
    return sum(num_prompt + before for before in counts)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else 0.0
