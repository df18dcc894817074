"""`torchrun ... -m megatron_async_rl.trainer.selftest CONFIG FOLDER`: a layout against TP1 PP1 CP1 on the same ranks.

The configuration's own model, made small, starts from the same random weights in both layouts and sees the same samples.
Loss and the gradient of every parameter must agree: in float32, so that no difference of layout hides in rounding.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megatron_async_rl import patches, processes
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import SelftestFailed
from megatron_async_rl.model.small_model import MAX_SAMPLE_TOKENS, VOCAB_SIZE
from megatron_async_rl.protocol.types import NOT_GENERATED, TrainSample

TOLERANCE = 1e-4  # of the largest entry of a gradient
VERSION = 1
_SAMPLES_PER_RANK = 6


def samples(count: int, seed: int) -> list[TrainSample]:
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
    """The user's layout and the plain one, for the small model in `folder`."""
    tree = msgspec.to_builtins(config)
    ranks = config.trainer_ranks
    tree["model"] |= {"path": str(folder), "random_init": True, "context_tokens": 2 * MAX_SAMPLE_TOKENS}
    tree["rollout"]["max_new_tokens"] = MAX_SAMPLE_TOKENS
    tree["trainer"] |= {"precision": "fp32", "max_tokens_per_microbatch": 2 * MAX_SAMPLE_TOKENS}
    tree["algorithm"] |= {
        "prompts_per_step": ranks * _SAMPLES_PER_RANK,
        "minibatches": 1,
    }
    tree["algorithm"]["reward_shaping"]["overlong_buffer_tokens"] = 0
    # Every rank keeps all of its gradient, to be looked at.
    megatron = {k: v for k, v in tree["megatron"].items() if not k.startswith("overlap_")}
    megatron["use_distributed_optimizer"] = False
    sizes = (
        "tensor_model",
        "pipeline_model",
        "virtual_pipeline_model",
        "context",
        "expert_model",
        "expert_tensor",
    )
    layout = {f"{name}_parallel_size" for name in sizes} | {"sequence_parallel"}
    layout |= {
        name for name in megatron if name.startswith(("recompute_", "pipeline_", "num_layers_in_"))
    }
    plain = {k: v for k, v in megatron.items() if k not in layout}
    return {
        "yours": configuration.from_tree(tree | {"megatron": megatron}),
        "TP1 PP1 CP1": configuration.from_tree(
            tree | {"megatron": plain, "trainer": tree["trainer"] | {"data_parallel_size": ranks}}
        ),
    }


def gradients(config: Config) -> tuple[dict[str, float], dict[str, Any]]:
    """(sums of the loss and its metrics, gradient of every Hugging Face tensor): on rank 0, elsewhere only its own."""
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    from megatron_async_rl.trainer import parallel, step
    from megatron_async_rl.trainer.data.microbatch import cut_minibatches
    from megatron_async_rl.trainer.model import build
    from megatron_async_rl.weights.reshard import hf_tensors

    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    parallel.init_parallel(config)
    policy = build.build(config)
    given = samples(config.trainer_ranks * _SAMPLES_PER_RANK, config.run.seed)
    share = given[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    group = mpu.get_data_parallel_group()
    [minibatch] = cut_minibatches(
        share, 1, VERSION, step.packing(policy, config), group, config.run.seed
    )
    totals = step.accumulate_gradients(policy, minibatch, config)
    mine = {
        name: tensor.float().cpu().numpy().copy()
        for name, tensor in hf_tensors(policy.modules, policy.shape, get=lambda p: p.main_grad)
    }
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return totals, {name: array for part in parts for name, array in part.items()}


def compare(got: dict[str, Any], want: dict[str, Any]) -> list[tuple[str, float]]:
    """(name, largest difference over the largest entry) in the model's order."""
    out = []
    for name, array in want.items():
        scale = np.abs(array).max() or 1.0
        out.append(
            (name, float(np.abs(got[name] - array).max() / scale) if name in got else float("inf"))
        )
    return out


def _selftest(config_path: Path, folder: Path) -> None:
    config = configuration.load(config_path)
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
        f"{config.trainer_ranks} ranks, {yours['tokens']:.0f} loss tokens: loss {yours['loss']:.6g} in your layout, "
        f"{plain['loss']:.6g} in TP1 PP1 CP1; {len(differences) - len(wrong)} of {len(differences)} gradients agree to "
        f"{TOLERANCE:g}, the worst {worst[0]} to {worst[1]:.2g}\n"
    )
    if wrong or not loss <= TOLERANCE or yours["tokens"] != plain["tokens"]:
        first = (
            f"the first parameter that differs is {wrong[0][0]} by {wrong[0][1]:.2g}"
            if wrong
            else "the loss differs"
        )
        raise SelftestFailed(
            f"this layout does not compute what TP1 PP1 CP1 does: {first}; do not train with it"
        )


if __name__ == "__main__":
    processes.main(lambda: _selftest(Path(sys.argv[1]), Path(sys.argv[2])), unwind=False)
