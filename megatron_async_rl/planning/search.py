"""Finds the best split of N GPUs into trainer and servers, and the samples in flight per server.

All splits that the parallel sizes allow are ranked by their bounds; the most promising ones are
simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from megatron_async_rl.config.checks import cross_check
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model import layout, memory
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.planning.costs import Costs
from megatron_async_rl.planning.hardware import GIB, Gpu
from megatron_async_rl.planning.predict import Load, Prediction, bounds, predict

NUM_SIMULATED = 5  # splits
GRAPH_BATCH = 256  # SGLang captures decode graphs up to this batch unless told otherwise
FREE_SHARE = 0.1  # of the trainer's GPU memory: CUDA context, NCCL, fragmentation
GAIN = 1.01  # of two that differ by less, the one with less staleness is better


@dataclass(frozen=True)
class Candidate:
    """A split of the GPUs, as the configuration that has it."""

    config: Config
    generation_bound: float  # trained tokens/s
    training_bound: float
    prediction: Prediction

    @property
    def num_gpus(self) -> int:
        return gpus_of(self.config)


def gpus_of(config: Config) -> int:
    """Returns the GPUs, on CPUs the ranks, of trainer and servers."""
    return config.trainer_ranks + config.rollout.servers * config.engine_tp


def splits(config: Config, hf: HfConfig, num_gpus: int, gpu: Gpu | None) -> list[Config]:
    """Returns the configurations that use `num_gpus`, less an unusable rest.

    `gpu`: its memory must hold the trainer; None: not checked. Raises ConfigError if there is none.
    """
    per_replica = config.trainer_ranks // config.trainer.data_parallel_size
    least = per_replica + config.engine_tp
    if num_gpus < least:
        sizes = " x ".join(
            f"{name}_parallel_size {config.parallel_size(name)}"
            for name in ("tensor_model", "pipeline_model", "context")
        )
        raise ConfigError(
            f"--gpus = {num_gpus} is less than {least}: one trainer replica has megatron.{sizes} = "
            f"{per_replica} ranks, and one server sglang.tp_size = {config.engine_tp}",
            f"give at least --gpus {least}, or lower these sizes",
        )
    found: list[Config] = []
    refused: ConfigError | None = None
    for replicas in range(1, (num_gpus - config.engine_tp) // per_replica + 1):
        servers = (num_gpus - replicas * per_replica) // config.engine_tp
        one = replace(
            config,
            trainer=replace(config.trainer, data_parallel_size=replicas, hosts=1),
            rollout=replace(config.rollout, servers=servers),
        )
        try:
            cross_check(one)  # replicas must divide the batch
            layout.check_trainer(layout.Layout.from_config(one), hf.shape())
            if gpu:
                _check_memory(one, hf, gpu)
        except ConfigError as e:
            refused = refused or e
            continue
        found.append(one)
    if not found and refused:
        raise ConfigError(f"--gpus = {num_gpus} has no split: {refused.problem}", refused.remedy)
    return found


def search(
    found: list[Config],
    costs_of: Callable[[Config], Costs],
    load: Load,
    report: Callable[[str], None],
) -> list[Candidate]:
    """Returns simulated candidates, the best first; `report` gets a text before each simulation.

    The best has the least staleness of those that train nearly the most tokens/s.
    """

    def rank(config: Config) -> float:
        generation, training = bounds(config, costs_of(config), load)
        return min(generation, training)

    def simulated(config: Config) -> Candidate:
        costs = costs_of(config)
        return Candidate(
            config, *bounds(config, costs, load), prediction=predict(config, costs, load)
        )

    candidates = []
    promising = sorted(found, key=rank, reverse=True)[:NUM_SIMULATED]
    for number, config in enumerate(promising, 1):
        report(f"split {number} of {len(promising)}")
        candidates.append(simulated(config))
    best = max(candidates, key=_rate)
    for concurrent in _other_loads(best.config, costs_of(best.config), load):
        report(f"{concurrent} samples in flight per server")
        rollout = replace(best.config.rollout, max_concurrent_samples=concurrent)
        candidates.append(simulated(replace(best.config, rollout=rollout)))
    candidates.sort(key=_rate, reverse=True)
    nearly_as_fast = [one for one in candidates if GAIN * _rate(one) >= _rate(candidates[0])]
    best = min(nearly_as_fast, key=lambda one: one.prediction.mean_staleness)
    candidates.remove(best)
    candidates.insert(0, best)
    return candidates


def _rate(candidate: Candidate) -> float:
    return candidate.prediction.trained_tokens_per_s


def _other_loads(config: Config, costs: Costs, load: Load) -> Iterator[int]:
    """Yields other numbers of samples in flight: the KV cache's capacity, half and double."""
    group, now = config.algorithm.samples_per_prompt, config.rollout.max_concurrent_samples
    limits = ("max_running_requests", "cuda_graph_max_bs_decode", "cuda_graph_max_bs")
    most = int(next(filter(None, map(config.sglang.get, limits)), GRAPH_BATCH))
    fits = int(costs.kv_tokens / load.lengths.mean_context)
    wanted = {min(most, count) // group * group for count in (fits, now // 2, now * 2)}
    yield from sorted(wanted - {now, 0})


def _check_memory(config: Config, hf: HfConfig, gpu: Gpu) -> None:
    """Raises ConfigError if a trainer rank does not fit."""
    limit, needed = (1 - FREE_SHARE) * gpu.memory_bytes, memory.trainer_memory(config, hf).peak
    if needed > limit:
        raise ConfigError(
            f"with trainer.data_parallel_size = {config.trainer.data_parallel_size} a trainer rank "
            f"needs {needed / GIB:.0f} GiB, and {gpu.name} has {limit / GIB:.0f} GiB free for it",
            "raise megatron.tensor_model_parallel_size or pipeline_model_parallel_size, or lower "
            "trainer.max_tokens_per_microbatch (docs/memory.md)",
        )
