"""Logits of Megatron's Qwen3-MoE for one sequence, and one training step; run by test_moe.py."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

import numpy as np
import torch
from model_shapes import weights_config_tree

from megatron_async_rl.config import load as configuration
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.trainer import parallel, pipeline, step
from megatron_async_rl.trainer.data.microbatch import Packing, pack
from megatron_async_rl.trainer.model import build

if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    tree = weights_config_tree(folder, {}, {})
    tree["trainer"]["data_parallel_size"] = 1
    tree["megatron"]["lr"] = 0.01
    settings = configuration.from_tree(tree)
    parallel.init_parallel(settings)
    policy = build.build(settings)
    ids = np.random.default_rng(0).integers(0, 51, 24).astype(np.int32)
    versions = np.where(np.arange(24) < 4, -1, 0).astype(np.int32)
    sample = TrainSample(ids, np.full(24, -4, np.float32), versions, np.ones(24, np.float32))
    microbatch = pack([sample], 0, Packing.of(policy, settings))
    with torch.no_grad():
        logits = pipeline.forward(policy, policy.chunks[0], microbatch)[0, :24, :51]
    stats = step.train_step(policy, [sample], 0, settings)
    torch.save(
        {
            "ids": torch.from_numpy(ids),
            "logits": logits,
            "grad_norm": torch.tensor(stats["train/grad_norm"]),
        },
        out,
    )
