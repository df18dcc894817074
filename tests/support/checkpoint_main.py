"""Trainer ranks that save and load checkpoints; run by test_checkpoint.py.

`torchrun ... checkpoint_main.py MODEL RUN_DIR COMMAND ADVANTAGE TP,PP,VPP...`, with COMMAND

    save            trains two steps, saves, trains two more while the save may still be running,
                    saves again, and writes the losses of the last two steps
    save-for-ever   saves one version again and again
    load            loads and trains the same two steps, in one layout after the other

Saving starts processes that import this module, so it does nothing when it is imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    from megatron_async_rl import patches, processes

    processes.die_with_parent()
    patches.prepare_megatron()
    import torch.distributed as dist

    for layout in sys.argv[5:]:
        run(*map(int, layout.split(",")))
    dist.barrier()
    dist.destroy_process_group()


def run(tp: int, pp: int, vpp: int) -> None:
    import numpy as np
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    from megatron_async_rl.config import load
    from megatron_async_rl.protocol.types import NOT_GENERATED, TrainSample
    from megatron_async_rl.storage import checkpoints
    from megatron_async_rl.trainer import parallel, step
    from megatron_async_rl.trainer.checkpoint.checkpoint import Checkpointer
    from megatron_async_rl.trainer.model import build

    model_dir, run_dir = Path(sys.argv[1]), Path(sys.argv[2])
    command, advantage = sys.argv[3], sys.argv[4]
    ranks = int(os.environ["WORLD_SIZE"])
    settings = load.from_tree(
        {
            "run": {"dir": str(run_dir), "steps": 10},
            "model": {"path": str(model_dir), "context_tokens": 64},
            "data": {"train": "unused"},
            "rollout": {"max_new_tokens": 16},
            "algorithm": {
                "prompts_per_step": 4,
                "samples_per_prompt": 2,
                "advantage": {"estimator": advantage},
            },
            "trainer": {"precision": "fp32", "data_parallel_size": ranks // tp // pp},
            "megatron": {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "virtual_pipeline_model_parallel_size": vpp,
                "lr": 0.01,
                "weight_decay": 0.1,
            },
            "checkpoint": {"every": 1, "asynchronous": command != "load"},
        }
    )
    if mpu.model_parallel_is_initialized():
        parallel.leave_parallel()
    parallel.init_parallel(settings)
    policy = build.build(settings)
    saved: list[tuple[int, str]] = []
    saver = Checkpointer(
        policy, settings, run_dir, lambda version, folder: saved.append((version, folder))
    )

    def batch(version: int) -> list[TrainSample]:
        """Returns this replica's share of eight samples, which are the same in every layout."""
        random = np.random.default_rng(version)
        samples = []
        for number in range(8):
            length = 12 + number
            versions = np.full(length, version, np.int32)
            versions[:4] = NOT_GENERATED
            samples.append(
                TrainSample(
                    ids=random.integers(3, 30, length).astype(np.int32),
                    logprobs=np.full(length, -3.0, np.float32),
                    versions=versions,
                    advantages=np.full(length, random.normal(), np.float32),
                )
            )
        return samples[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]

    def train(first: int) -> list[float]:
        stats = [
            step.train_step(policy, batch(version), version, settings)
            for version in (first, first + 1)
        ]
        return [
            value
            for s in stats
            for value in (s["train/loss"], s["train/grad_norm"], s.get("critic/loss", 0.0))
        ]

    if command == "save-for-ever":
        train(0)
    while command == "save-for-ever":
        saver.save(2)
        saver._version = -1
    if command == "save":
        train(0)
        saver.step(2)
        losses = train(2)  # the save of version 2 may still be running
        saver.save(4)
        if dist.get_rank() == 0:
            for version, folder in saved:
                checkpoints.commit(run_dir, version, folder, 0, 0)
            (run_dir / "losses.json").write_text(json.dumps({"saved": saved, "losses": losses}))
    else:
        version = saver.load()
        losses = train(2)
        if dist.get_rank() == 0:
            (run_dir / f"loaded-{tp}-{pp}-{vpp}-{ranks}.json").write_text(
                json.dumps({"version": version, "losses": losses})
            )
    saver.close()


if __name__ == "__main__":
    main()
