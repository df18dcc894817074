"""Sets up torch.distributed and Megatron's process groups on this rank."""

from __future__ import annotations

import os
import random
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.weights.update_group import STORE_VARIABLE


def device() -> torch.device:
    """Returns this rank's GPU, or the CPU without CUDA."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def init_parallel(config: Config) -> None:
    """Joins the other ranks that torchrun started, creates Megatron's groups, seeds all generators.

    After leave_parallel() a second call creates the groups again. Raises ConfigError if
    the number of ranks is not that of the configured layout.
    """
    torch.set_num_threads(config.trainer.cpu_threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != config.trainer_ranks:
        sizes = [f"trainer.data_parallel_size = {config.trainer.data_parallel_size}"]
        for name in ("tensor_model", "pipeline_model", "context"):
            sizes.append(f"megatron.{name}_parallel_size = {config.parallel_size(name)}")
        raise ConfigError(
            f"{world} trainer ranks were started, but {' * '.join(sizes)} needs "
            f"{config.trainer_ranks}; start as many (torchrun --nproc-per-node), or change a size"
        )
    timeout = timedelta(seconds=config.trainer.collective_timeout_s)
    if not dist.is_initialized():
        one_rank = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
        for name, value in one_rank.items():
            os.environ.setdefault(name, value)
        path = os.environ.get(STORE_VARIABLE)  # set if all ranks are on one host
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            timeout=timeout,
            rank=int(os.environ["RANK"]) if path else -1,
            world_size=world if path else -1,
            store=dist.FileStore(path, world) if path else None,
        )
    vpp = config.parallel_size("virtual_pipeline_model")
    mpu.initialize_model_parallel(
        config.parallel_size("tensor_model"),
        config.parallel_size("pipeline_model"),
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        expert_model_parallel_size=config.parallel_size("expert_model"),
        expert_tensor_parallel_size=config.megatron.get("expert_tensor_parallel_size"),
        context_parallel_size=config.parallel_size("context"),
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
    )
    seed = config.run.seed
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def leave_parallel() -> None:
    """Ends Megatron's process groups, with the threads that each of them has; collective."""
    dist.barrier()
    mpu.destroy_model_parallel()
    for group in [group for group in c10d._world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)


def context_parallel_sum(x: Tensor) -> Tensor:
    """Returns the sum over the context-parallel ranks, on each; collective, also in backward.

    Every rank's loss depends on every rank's summand, and the total loss is their sum: so a
    summand's gradient is the sum of the gradients on all ranks.
    """
    return _ContextParallelSum.apply(x)


class _ContextParallelSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=mpu.get_context_parallel_group())
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _ContextParallelSum.forward(ctx, grad)
