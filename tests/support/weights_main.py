"""The trainer's end of weight updates, one layout after the other; run by weight_ranks.py.

RUN_DIR/work.json is a list of {"config": tree, "versions": [first, last]}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_async_rl.config import load as configuration
from megatron_async_rl.protocol.messages import Hello
from megatron_async_rl.protocol.sync_link import SyncLink
from megatron_async_rl.trainer import parallel
from megatron_async_rl.trainer.model import build
from megatron_async_rl.weights.publish import WeightPublisher
from megatron_async_rl.weights.reshard import is_source

if __name__ == "__main__":
    run_dir = Path(sys.argv[1])
    for item in json.loads((run_dir / "work.json").read_text()):
        settings = configuration.from_tree(item["config"])
        if mpu.model_parallel_is_initialized():
            parallel.leave_parallel()
        parallel.init_parallel(settings)
        _, shape, modules = build.build_modules(settings)
        socket = None
        if is_source():
            socket = SyncLink(run_dir)
            stage = mpu.get_pipeline_model_parallel_rank()
            socket.join(Hello("trainer", f"trainer-{dist.get_rank()}", os.getpid(), stage=stage))
        publisher = WeightPublisher(modules, shape, settings, socket)
        first, last = item["versions"]
        for version in range(first, last + 1):
            publisher.publish(version)
        dist.barrier()
        if socket is not None:
            socket.close()
    dist.destroy_process_group()
