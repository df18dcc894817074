"""Measures tokens/s, model-FLOPs utilization and peak memory of the product's own train_step.

The peak is printed beside the estimate of `doctor` and `slurm --plan`.

    bench=tools/bench/bench_trainer.py
    torchrun --nproc-per-node 1 $bench model=8b,layers=12 model=1.7b,mix=8k,recompute=full
    torchrun --nproc-per-node 2 $bench model=8b,mix=32k        # TP=2 with sequence parallelism
    experts=model=30b-a3b,layers=4,mix=8k,tokens=65536,budget=16384
    torchrun --nproc-per-node 1 $bench $experts $experts,experts=loop

Models are Qwen3 shapes with random weights; TP, and EP of a model with experts, is the number of
processes. Each argument is one scenario. Its keys:

    model       0.6b, 1.7b, 8b, 30b-a3b (shapes of Qwen3), or tiny, tiny-moe (to try it on a CPU)
    experts     grouped: one matrix product for all experts; loop: expert by expert
    layers      a smaller number of layers than the model has
    mix         8k: log-normal lengths with mean 2k, at most 8k tokens; 32k: mean 8k, at most 32k;
                even32k: all 32k; MEAN-LONGEST: another log-normal mix
    tokens      tokens per step (approximately)
    budget      tokens per micro-batch
    recompute   none, full (every layer), or the number of layers
    cutting     dynamic: packed under the budget; fixed: in order of arrival, as many samples per
                micro-batch as always fit; a number: in order of arrival, that many micro-batches
                with equally many samples
    overlap     yes: tensor-parallel communication overlaps the matrix products
                (megatron.tp_comm_overlap)
    minibatches optimizer steps per step; more than 1 adds the proximal pass, timed separately
    steps       timed steps, after one warm-up step
    profile     a file name: also writes a profile of one step

Model FLOPs: 6 per token and weight of a matrix product (not of the embedding; of the experts, those
chosen for the token), plus 6 * length^2 * heads * head size per sequence and layer for causal
attention. Recomputation does not count. Utilization is relative to the measured rate of a bf16
8192 x 8192 x 8192 product of random data. A step includes packing, forward, backward, clipping and
the optimizer.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_async_rl.config.config import Config
from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

import megatron.core
import numpy as np
import torch
import torch.distributed as dist
from bench_models import shape_of
from bench_parts import make_parser
from megatron.core import parallel_state as mpu
from trainer_scenarios import make_config, mean_and_longest, samples_of, scenario

from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.memory import GIB, trainer_memory
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.trainer import parallel, report, step
from megatron_async_rl.trainer.data.microbatch import Packing, pack
from megatron_async_rl.trainer.model.build import TrainerModel
from megatron_async_rl.trainer.model.build import build as trainer_model


def fixed_step(
    model: TrainerModel, samples: list[TrainSample], longest: int, cutting: str, config: Config
) -> dict[str, float]:
    """Runs a step with equally many samples per micro-batch, independent of their lengths."""
    packing = Packing.of(model, config)
    if cutting == "fixed":
        count = max(1, config.trainer.max_tokens_per_microbatch // longest)
        cut = [pack(samples[n : n + count], 0, packing) for n in range(0, len(samples), count)]
    else:
        parts = np.array_split(np.arange(len(samples)), min(int(cutting), len(samples)))
        cut = [pack([samples[n] for n in part], 0, packing) for part in parts]
    totals, _ = step.train_minibatch(model, cut, 0, config)
    return report.summary([totals]) | {"perf/time/proximal_s": 0.0}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_rate(size: int = 8192, count: int = 20) -> float:
    """Returns the FLOP/s of a bf16 product of random square matrices."""
    if not torch.cuda.is_available():
        size, count = 512, 5
    a, b = (
        torch.randn(size, size, device=parallel.device(), dtype=torch.bfloat16) for _ in range(2)
    )
    for _ in range(3):
        a @ b
    synchronize()
    started = time.perf_counter()
    for _ in range(count):
        a @ b
    synchronize()
    return 2.0 * size**3 * count / (time.perf_counter() - started)


def run(s: dict[str, str], rate: float) -> dict[str, Any]:
    shape = shape_of(s["model"], s["layers"])
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(shape, s, Path(folder))
        estimate = trainer_memory(config, HfConfig(config.model.path)).peak / GIB
        if not mpu.model_parallel_is_initialized():
            parallel.init_parallel(config)
        model = trainer_model(config)
    samples = samples_of(s["mix"], int(s["tokens"]), shape["vocab_size"])
    lengths = [len(sample.ids) for sample in samples]

    def once() -> dict[str, float]:
        if s["cutting"] != "dynamic":
            return fixed_step(model, samples, mean_and_longest(s["mix"])[1], s["cutting"], config)
        return step.train_step(model, samples, 0, config)

    once()
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds, stats = [], {}
    for _ in range(int(s["steps"])):
        started = time.perf_counter()
        stats = once()
        synchronize()
        seconds.append(time.perf_counter() - started - stats["perf/time/proximal_s"])
    if s["profile"]:
        profile(once, Path(s["profile"]))
    median, world = statistics.median(seconds), dist.get_world_size()
    flops = model.flops.training(lengths)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
    return s | {
        "layers": shape["num_hidden_layers"],
        "tp": world,
        "samples": len(samples),
        "tokens": sum(lengths),
        "step_s": median,
        "steps_s": seconds,
        "proximal_s": stats["perf/time/proximal_s"],
        "tokens_per_s_per_gpu": sum(lengths) / median / world,
        "tflops_per_gpu": flops / median / world / 1e12,
        "utilization": flops / median / world / rate,
        "packing": stats["train/packing_efficiency"],
        "imbalance": stats["train/packing_imbalance"],
        "peak_gib": peak,
        "estimate_gib": estimate,
    }


def profile(once: Any, path: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        once()
        synchronize()
    if dist.get_rank() == 0:
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=45, max_name_column_width=110)
        path.write_text(table)


COLUMNS = (
    "model | experts | layers | TP | mix | budget | recompute | cutting | tokens/step | step s "
    "| tokens/s/GPU | TFLOP/s/GPU | of matrix rate | packed | proximal s | peak GiB | estimate GiB"
)


def row(r: dict[str, Any]) -> str:
    cells = [
        r["model"],
        r["experts"] if "num_experts" in shape_of(r["model"]) else "",
        r["layers"],
        r["tp"],
        r["mix"],
        r["budget"],
        r["recompute"],
        r["cutting"],
        r["tokens"],
    ]
    cells += [
        f"{r['step_s']:.2f}",
        f"{r['tokens_per_s_per_gpu']:.0f}",
        f"{r['tflops_per_gpu']:.1f}",
    ]
    cells += [
        f"{r['utilization']:.1%}",
        f"{r['packing']:.1%}",
        f"{r['proximal_s']:.2f}",
        f"{r['peak_gib']:.1f}",
        f"{r['estimate_gib']:.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("scenarios", nargs="+", type=scenario)
    parser.add_argument(
        "--json", type=Path, help="also write the figures to this file, one JSON object per line"
    )
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    rate = matrix_rate()
    say(
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, "
        f"torch {torch.__version__}, megatron-core {megatron.core.__version__}; "
        f"bf16 matrix rate {rate / 1e12:.1f} TFLOP/s\n\n| {COLUMNS} |\n"
        + "|---" * (COLUMNS.count("|") + 1)
        + "|"
    )
    for s in arguments.scenarios:
        try:
            result = run(s, rate)
        except torch.OutOfMemoryError as e:
            say(f"| {s} | out of memory: {str(e).splitlines()[0][:600]} |")
            if dist.get_world_size() > 1:
                raise SystemExit(1) from e  # the other ranks may be inside a collective
            result = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if result and dist.get_rank() == 0:
            say(row(result))
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    say(f"\nmatrix rate afterwards {matrix_rate() / 1e12:.1f} TFLOP/s")
    dist.destroy_process_group()


def say(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
