"""`torchrun -m megatron_async_rl.trainer.selftest CONFIG FOLDER`: checks objective and layout.

First the policy objective alone (algorithms/contract.py). Then the layout is compared with TP1 PP1
CP1 on the same ranks: a small version of the configured model (in FOLDER) starts from the same
random weights in both layouts and gets the same samples. Loss and all gradients must agree, in
float32, so that rounding cannot hide a wrong layout.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megatron_async_rl import hooks, patches, processes
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import SelftestFailed
from megatron_async_rl.model import pipeline_split
from megatron_async_rl.model.small_model import MAX_SAMPLE_TOKENS, VOCAB_SIZE, small_chunks
from megatron_async_rl.protocol.types import NOT_GENERATED, TrainSample

TOLERANCE = 1e-4  # of the largest entry of a gradient
VERSION = 1
_SAMPLES_PER_RANK = 6


def samples(count: int, seed: int) -> list[TrainSample]:
    """Returns random samples of random lengths, partly one version stale."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        length, prompt = int(rng.integers(6, MAX_SAMPLE_TOKENS)), int(rng.integers(1, 5))
        versions = rng.integers(VERSION - 1, VERSION + 1, length)
        versions[:prompt] = NOT_GENERATED
        logprobs = (-np.log(VOCAB_SIZE) + 0.1 * rng.normal(size=length)).astype(np.float32)
        advantages = np.full(length, rng.normal(), np.float32)
        ids = rng.integers(0, VOCAB_SIZE, length).astype(np.int32)
        out.append(TrainSample(ids, logprobs, versions.astype(np.int32), advantages))
    return out


def variants(config: Config, folder: Path) -> dict[str, Config]:
    """Returns the configured layout and the plain one, for the small model in `folder`."""
    tree = msgspec.to_builtins(config)
    ranks = config.trainer_ranks
    budget = 2 * MAX_SAMPLE_TOKENS
    tree["model"] |= {"path": str(folder), "random_init": True, "context_tokens": budget}
    tree["rollout"]["max_new_tokens"] = MAX_SAMPLE_TOKENS
    tree["trainer"] |= {"precision": "fp32", "max_tokens_per_microbatch": budget}
    tree["algorithm"] |= {"prompts_per_step": ranks * _SAMPLES_PER_RANK, "minibatches": 1}
    tree["algorithm"]["reward_shaping"]["overlong_buffer_tokens"] = 0
    # Every rank keeps its whole gradient, for the comparison.
    megatron = {k: v for k, v in tree["megatron"].items() if not k.startswith("overlap_")}
    megatron["use_distributed_optimizer"] = False
    megatron = {k: v for k, v in megatron.items() if k not in pipeline_split.KEYS}
    prefixes = ("recompute_", "pipeline_")
    plain = {
        key: value
        for key, value in megatron.items()
        if not key.endswith("_parallel_size")
        and key != "sequence_parallel"
        and not key.startswith(prefixes)
    }
    chunks = small_chunks(config)
    if len(set(chunks)) > 1:
        megatron["pipeline_model_parallel_layout"] = pipeline_split.megatron_layout(chunks)
    return {
        "yours": configuration.from_tree(tree | {"megatron": megatron}),
        "TP1 PP1 CP1": configuration.from_tree(
            tree | {"megatron": plain, "trainer": tree["trainer"] | {"data_parallel_size": ranks}}
        ),
    }


def gradients(config: Config) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains one minibatch without a step: (sums of the loss, gradient of every HF tensor)."""
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    from megatron_async_rl.trainer import parallel, step
    from megatron_async_rl.trainer.data.microbatch import Packing, make_minibatches
    from megatron_async_rl.trainer.model import build
    from megatron_async_rl.weights.reshard import hf_tensors

    if mpu.model_parallel_is_initialized():
        parallel.leave_parallel()
    parallel.init_parallel(config)
    policy = build.build(config)
    batch = samples(config.trainer_ranks * _SAMPLES_PER_RANK, config.run.seed)
    share = batch[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    [minibatch] = make_minibatches(share, VERSION, Packing.of(policy, config), config)
    totals = step.accumulate_gradients(policy, minibatch, config)
    own = {
        name: tensor.float().cpu().numpy().copy()
        for name, tensor in hf_tensors(policy.modules, policy.shape, get=lambda p: p.main_grad)
    }
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return totals, {name: array for part in parts for name, array in part.items()}


def compare(got: dict[str, Any], want: dict[str, Any]) -> list[tuple[str, float]]:
    """Returns (name, largest difference over the largest entry) of each tensor; inf if missing."""

    def difference(name: str, array: Any) -> float:
        if name not in got:
            return float("inf")
        return float(np.abs(got[name] - array).max() / (np.abs(array).max() or 1.0))

    return [(name, difference(name, array)) for name, array in want.items()]


def _check_objective(config: Config) -> None:
    """Writes the problems of the objective, each in one line. Raises SelftestFailed if any.

    Rank 0 checks alone: another rank that failed first would end it before it has written.
    """
    if os.environ["RANK"] != "0":
        return
    from megatron_async_rl.trainer.algorithms import contract, objectives

    name = config.algorithm.loss.objective
    checks = list(contract.objective_checks(config.algorithm))
    failed = any(problem for _, problem in checks)
    lines = hooks.check_lines(objectives.SETTING, name, checks)
    if not failed and (note := contract.sign_note(config.algorithm)):
        lines.append(f"note: {objectives.SETTING} = {name}: {note}")
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()
    if failed:
        raise SelftestFailed(
            f"{objectives.SETTING} = {name} breaks rules of the trainer, see above; do not train "
            "with it"
        )


def _selftest(config_path: Path, folder: Path) -> None:
    config = configuration.load(config_path)
    _check_objective(config)
    patches.prepare_megatron()
    import torch.distributed as dist

    (yours, got), (plain, want) = [gradients(c) for c in variants(config, folder).values()]
    if dist.get_rank() != 0:
        return
    differences = compare(got, want)
    loss = abs(yours["loss"] - plain["loss"]) / max(abs(plain["loss"]), 1.0)
    wrong = [(name, d) for name, d in differences if not d <= TOLERANCE]
    worst = max(differences, key=lambda pair: pair[1])
    sys.stdout.write(
        f"{config.trainer_ranks} ranks, {yours['tokens']:.0f} loss tokens: loss "
        f"{yours['loss']:.6g} in your layout, {plain['loss']:.6g} in TP1 PP1 CP1; "
        f"{len(differences) - len(wrong)} of {len(differences)} gradients agree to {TOLERANCE:g}, "
        f"the worst {worst[0]} to {worst[1]:.2g}\n"
    )
    if wrong or not loss <= TOLERANCE or yours["tokens"] != plain["tokens"]:
        first = "the loss differs"
        if wrong:
            first = f"the first parameter that differs is {wrong[0][0]} by {wrong[0][1]:.2g}"
        raise SelftestFailed(
            f"this layout does not compute the same as TP1 PP1 CP1: {first}; do not train with it"
        )


if __name__ == "__main__":
    processes.main(lambda: _selftest(Path(sys.argv[1]), Path(sys.argv[2])), unwind=False)
