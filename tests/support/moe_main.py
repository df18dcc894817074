"""A model with experts on one rank, with grouped and with sequential experts; run by test_moe.py.

Writes logits of one sequence, gradients of one step, and logits after a checkpoint of grouped
experts was loaded into sequential ones and back.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

import numpy as np
import torch
from megatron.core import dist_checkpointing
from model_shapes import weights_config_tree

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.trainer import parallel, pipeline, step
from megatron_async_rl.trainer.checkpoint import checkpoint
from megatron_async_rl.trainer.data.microbatch import Packing, pack
from megatron_async_rl.trainer.model import build
from megatron_async_rl.weights.reshard import hf_tensors


def settings(folder: Path, precision: str = "fp32", **megatron: Any) -> Config:
    tree = weights_config_tree(folder, {}, {})
    tree["trainer"]["precision"] = precision
    tree["trainer"]["data_parallel_size"] = 1
    tree["megatron"] |= {"lr": 0.01, "use_distributed_optimizer": False} | megatron
    return configuration.from_tree(tree)


def make_sample() -> TrainSample:
    ids = np.random.default_rng(0).integers(0, 51, 24).astype(np.int32)
    versions = np.where(np.arange(24) < 4, -1, 0).astype(np.int32)
    return TrainSample(ids, np.full(24, -4, np.float32), versions, np.ones(24, np.float32))


def logits(policy: build.TrainerModel, config: Config) -> torch.Tensor:
    microbatch = pack([make_sample()], 0, Packing.of(policy, config))
    with torch.no_grad():
        return pipeline.forward(policy, policy.chunks[0], microbatch)[0, :24, :51].clone()


def trained(policy: build.TrainerModel, config: Config) -> dict[str, Any]:
    """Returns the gradients of a step, by Hugging Face name, its metrics, and the weights after."""
    metrics = step.train_step(policy, [make_sample()], 0, config)
    gradients = hf_tensors(policy.modules, policy.shape, get=lambda p: p.main_grad)
    return {
        "gradients": {name: tensor.clone() for name, tensor in gradients},
        "grad_norm": metrics["train/grad_norm"],
        "logits after": logits(policy, config),
    }


def sharded(policy: build.TrainerModel) -> dict[str, Any]:
    return policy.modules[0].sharded_state_dict(metadata=checkpoint._metadata())


def load_into(policy: build.TrainerModel, folder: Path) -> None:
    policy.modules[0].load_state_dict(dist_checkpointing.load(sharded(policy), str(folder)))


if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    configs = {
        "grouped": settings(folder),
        "sequential": settings(folder, moe_grouped_gemm=False),
        "auxiliary loss": settings(
            folder, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1.0
        ),
    }
    parallel.init_parallel(configs["grouped"])
    bf16 = build.build(settings(folder, "bf16"))
    results: dict[str, Any] = {
        "bf16": {name: t.clone() for name, t in hf_tensors(bf16.modules, bf16.shape)}
    }
    results |= {"ids": torch.from_numpy(make_sample().ids)}
    policies = {name: build.build(config) for name, config in configs.items()}
    for name, policy in policies.items():
        results[name] = {"logits": logits(policy, configs[name])} | trained(policy, configs[name])
    # a checkpoint of trained grouped experts, through sequential ones, into fresh grouped ones
    chain = [policies["grouped"], policies["sequential"], build.build(configs["grouped"])]
    for number, policy in enumerate(chain):
        if number:
            load_into(policy, out.parent / f"checkpoint{number - 1}")
        saved = out.parent / f"checkpoint{number}"
        saved.mkdir()
        dist_checkpointing.save(sharded(policy), str(saved))
    results["loaded"] = [logits(policy, configs["grouped"]) for policy in chain[1:]]
    torch.save(results, out)
