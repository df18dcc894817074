"""Predicts one configuration: simulates some of its steps and averages them.

A large fleet is simulated as a part of it, servers, batch and trainer reduced in proportion, so
that a prediction takes seconds.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, replace

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.core.settings import core_settings
from megatron_async_rl.planning.costs import Costs
from megatron_async_rl.planning.lengths import Lengths
from megatron_async_rl.planning.simulation import Simulation, Workload
from megatron_async_rl.planning.steps import Step

MAX_SAMPLES = 10_000  # of one simulation
COUNTED_STEPS = 6
MAX_WARM_UP_STEPS = 10
MAX_RUNNING = 512  # of a server without sglang.max_running_requests
ENDLESS = 1 << 30  # steps: admission does not stop before the end of the simulated ones


@dataclass(frozen=True)
class Load:
    """The samples that a run generates: their lengths, and the dropped fraction."""

    lengths: Lengths
    dropped_fraction: float = 0.0  # of the groups, by filters


@dataclass(frozen=True)
class Prediction:
    """Means over the simulated steps; tokens of the whole fleet."""

    step_s: float
    trained_tokens_per_s: float
    generated_tokens_per_s: float
    mean_staleness: float
    max_staleness: int
    trainer_idle: float
    server_idle: float
    kv_use: float
    part: float  # of the fleet that was simulated


def bounds(config: Config, costs: Costs, load: Load) -> tuple[float, float]:
    """Returns the trained tokens/s that generation alone and training alone allow."""
    algorithm, context = config.algorithm, load.lengths.mean_context
    num_samples = algorithm.prompts_per_step * algorithm.samples_per_prompt
    admitted = (config.staleness.max_staleness + 1) * num_samples / config.rollout.servers
    running = max(1.0, min(_max_running(config), costs.kv_tokens / context, admitted))
    generation = config.rollout.servers * costs.decode.tokens_per_s(running, context)
    step_s = sum(costs.train.seconds(batch_lengths(load, num_samples)))
    training = num_samples * load.lengths.mean_response / (step_s + costs.update_s)
    return generation * (1 - load.dropped_fraction), training


def batch_lengths(load: Load, num_samples: int) -> list[int]:
    """Returns the lengths of a typical batch: evenly spread over those of the load."""
    lengths = sorted((load.lengths.prompt_tokens + load.lengths.response_tokens).tolist())
    return [lengths[(2 * n + 1) * len(lengths) // (2 * num_samples)] for n in range(num_samples)]


def predict(config: Config, costs: Costs, load: Load, max_samples: int = MAX_SAMPLES) -> Prediction:
    """Simulates the run from its start and returns the means of its steady steps."""
    warm_up = min(config.staleness.max_staleness + 2, MAX_WARM_UP_STEPS)
    count = warm_up + COUNTED_STEPS
    workload, reduced, part = _reduced(config, costs, load, max_samples // count)
    steps = Simulation(workload, reduced).steps()
    return average(list(itertools.islice(steps, count))[warm_up:], part)


def average(steps: list[Step], part: float = 1.0) -> Prediction:
    """Returns the means of simulated steps of this part of a fleet."""
    seconds = sum(step.seconds for step in steps)
    trained = sum(step.trained_tokens for step in steps)
    return Prediction(
        step_s=seconds / len(steps),
        trained_tokens_per_s=trained / seconds / part,
        generated_tokens_per_s=sum(step.generated_tokens for step in steps) / seconds / part,
        mean_staleness=sum(s.mean_staleness * s.trained_tokens for s in steps) / trained,
        max_staleness=max(step.max_staleness for step in steps),
        trainer_idle=sum(step.wait_s for step in steps) / seconds,
        server_idle=sum(step.server_idle * step.seconds for step in steps) / seconds,
        kv_use=statistics.fmean(step.kv_use for step in steps),
        part=part,
    )


def workload_of(config: Config, load: Load) -> Workload:
    """Returns the workload of the whole run."""
    return Workload(
        settings=core_settings(config),
        lengths=load.lengths,
        servers=config.rollout.servers,
        concurrent=config.rollout.max_concurrent_samples,
        max_running=_max_running(config),
        interrupt=config.weights.interrupt,
        keep_kv=config.weights.kv_cache == "keep",
        dropped_fraction=load.dropped_fraction,
        seed=config.run.seed,
    )


def _reduced(
    config: Config, costs: Costs, load: Load, max_samples: int
) -> tuple[Workload, Costs, float]:
    """Returns workload and costs of a part of the fleet, and this part.

    `max_samples`: of one step; the part has at least one server and one group.
    """
    whole = workload_of(config, load)
    prompts = whole.settings.prompts_per_step
    wanted = min(1.0, max_samples / (prompts * whole.settings.samples_per_prompt))
    servers = max(1, round(whole.servers * wanted))
    reduced_prompts = max(1, round(prompts * servers / whole.servers))
    part = reduced_prompts / prompts
    settings = replace(whole.settings, prompts_per_step=reduced_prompts, steps=ENDLESS)
    train = replace(costs.train, replicas=costs.train.replicas * part)
    return (
        replace(whole, settings=settings, servers=servers),
        replace(costs, train=train),
        part,
    )


def _max_running(config: Config) -> int:
    limit = config.sglang.get("max_running_requests")
    return min(config.rollout.max_concurrent_samples, limit if limit else MAX_RUNNING)
