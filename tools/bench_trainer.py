"""How fast the trainer trains: tokens/s, model-FLOPs utilisation and peak memory of the product's own train_step.

    torchrun --nproc-per-node 1 tools/bench_trainer.py model=8b,layers=12,mix=32k model=1.7b,mix=8k,recompute=full
    torchrun --nproc-per-node 2 tools/bench_trainer.py model=8b,mix=32k            # TP=2 with sequence parallelism

Models are Qwen3 shapes with random weights; TP is the number of processes. Each argument is one scenario; keys:

    model       1.7b, 8b (shapes of Qwen3), or tiny (for a try on the CPU)
    layers      fewer than the model has
    mix         8k: response lengths log-normal, mean 2k, at most 8k tokens; 32k: mean 8k, at most 32k; even32k: all 32k
    tokens      about so many tokens a step
    budget      tokens of a micro-batch
    recompute   none, full (every layer), or the number of layers
    cutting     dynamic: packed under the budget; fixed: in order of arrival, as many a micro-batch as always fit
    minibatches optimizer steps a step; more than 1 adds the proximal pass, which is timed apart
    steps       timed steps, after one that warms up
    profile     a file name: also writes where the time of one step goes

Model FLOPs: 6 per token and weight of a matrix product (the embedding is none), and for causal attention
6 * length^2 * heads * head size per sequence and layer. What is recomputed does not count. Utilisation is against the
rate of a bf16 8192 x 8192 x 8192 product on random data, measured first. The step is everything: packing, forward,
backward, clipping, optimizer.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_async_rl import config as configuration
from megatron_async_rl.config import Config
from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

import megatron.core  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402

from megatron_async_rl.trainer import model as trainer_model  # noqa: E402
from megatron_async_rl.trainer import parallel, step  # noqa: E402
from megatron_async_rl.trainer.data import pack  # noqa: E402
from megatron_async_rl.trainer.model import TrainerModel  # noqa: E402
from megatron_async_rl.types import NOT_GENERATED, TrainSample  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {  # config.json of Qwen3; vocabulary and embeddings as published
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1001,
    },
}
COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MIXES = {"8k": (2048, 8192), "32k": (8192, 32768), "even32k": (1 << 40, 32768), "tiny": (64, 256)}  # mean, longest
SIGMA = 1.0  # of the log-normal: half of the samples are shorter than 0.6 of the mean
DEFAULTS = {"model": "8b", "layers": "", "mix": "32k", "tokens": "131072", "budget": "32768", "recompute": "none"}
DEFAULTS |= {"cutting": "dynamic", "minibatches": "1", "steps": "2", "profile": ""}


def scenario(text: str) -> dict[str, str]:
    given = dict(part.split("=", 1) for part in text.split(","))
    if unknown := given.keys() - DEFAULTS.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not a key; known are {', '.join(DEFAULTS)}")
    return DEFAULTS | given


def samples_of(mix: str, tokens: int, vocab: int) -> list[TrainSample]:
    """Random tokens; behavior logprobs about those of a random model, so that no importance weight is extreme."""
    rng = np.random.default_rng(0)
    mean, longest = MIXES[mix]
    samples, total = [], 0
    while total < tokens:
        drawn = rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)
        length = int(np.clip(drawn, 16, min(longest, max(tokens - total, 16))))
        versions = np.where(np.arange(length) < min(512, length // 4), NOT_GENERATED, 0).astype(np.int32)
        logprobs = (-np.log(vocab) + 0.05 * rng.normal(size=length)).astype(np.float32)
        advantages = np.full(length, rng.choice([-1.0, 1.0]), np.float32)
        samples.append(TrainSample(rng.integers(0, vocab, length).astype(np.int32), logprobs, versions, advantages))
        total += length
    return samples


def model_flops(shape: dict[str, Any], lengths: list[int]) -> float:
    h, f, heads, d = (shape[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim"))
    layer = h * d * (2 * heads + 2 * shape["num_key_value_heads"]) + 3 * h * f
    weights = shape["num_hidden_layers"] * layer + h * shape["vocab_size"]
    attention = 6 * shape["num_hidden_layers"] * heads * d * sum(n * n for n in lengths)
    return 6.0 * weights * sum(lengths) + attention


def make_config(shape: dict[str, Any], s: dict[str, str], folder: Path) -> Config:
    (folder / "config.json").write_text(json.dumps(shape))
    tp = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    megatron: dict[str, Any] = {"tensor_model_parallel_size": tp, "sequence_parallel": tp > 1, "lr": 1e-6}
    if s["recompute"] == "full":
        megatron |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif s["recompute"] != "none":
        megatron |= {"recompute_granularity": "full", "recompute_method": "block"}
        megatron["recompute_num_layers"] = int(s["recompute"])
    return configuration.from_tree(
        {
            "run": {"dir": "unused", "steps": 1000},
            "model": {"path": str(folder), "context_tokens": 40960, "random_init": True},
            "data": {"train": "unused"},
            "rollout": {"max_new_tokens": 40000},
            "algorithm": {"prompts_per_step": 64, "samples_per_prompt": 8, "minibatches": int(s["minibatches"])},
            "trainer": {
                "max_tokens_per_microbatch": int(s["budget"]),
                "precision": "bf16" if torch.cuda.is_available() else "fp32",
            },
            "megatron": megatron,
        }
    )


def fixed_step(model: TrainerModel, samples: list[TrainSample], longest: int, config: Config) -> dict[str, float]:
    """A step with micro-batches of equally many samples, few enough that the longest ones would fit."""
    count = max(1, config.trainer.max_tokens_per_microbatch // longest)
    packing = step.packing(model, config)
    cut = [pack(samples[n : n + count], 0, packing) for n in range(0, len(samples), count)]
    totals = step.accumulate_gradients(model, cut, config)
    step.apply_gradients(model, totals, 0)
    return {"train/packing_efficiency": totals["packed"] / totals["budget"], "perf/time/proximal_s": 0.0}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_rate(size: int = 8192, count: int = 20) -> float:
    """FLOP/s of a bf16 product of square matrices of random numbers."""
    if not torch.cuda.is_available():
        size, count = 512, 5
    a, b = (torch.randn(size, size, device=parallel.device(), dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize()
    started = time.perf_counter()
    for _ in range(count):
        a @ b
    synchronize()
    return 2.0 * size**3 * count / (time.perf_counter() - started)


def run(s: dict[str, str], rate: float) -> dict[str, Any]:
    shape = COMMON | SHAPES[s["model"]]
    if s["layers"]:
        shape["num_hidden_layers"] = int(s["layers"])
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(shape, s, Path(folder))
        if not mpu.model_parallel_is_initialized():
            parallel.init_parallel(config)
        model = trainer_model.build(config)
    samples = samples_of(s["mix"], int(s["tokens"]), shape["vocab_size"])
    lengths = [len(sample.ids) for sample in samples]

    def once() -> dict[str, float]:
        if s["cutting"] == "fixed":
            return fixed_step(model, samples, MIXES[s["mix"]][1], config)
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
    flops = model_flops(shape, lengths)
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
        "utilisation": flops / median / world / rate,
        "packing": stats["train/packing_efficiency"],
        "peak_gib": peak,
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
    "model | layers | TP | mix | budget | recompute | cutting | tokens/step | step s | tokens/s/GPU | TFLOP/s/GPU | "
    "of matrix rate | packed | proximal s | peak GiB"
)


def row(r: dict[str, Any]) -> str:
    cells = [r["model"], r["layers"], r["tp"], r["mix"], r["budget"], r["recompute"], r["cutting"], r["tokens"]]
    cells += [f"{r['step_s']:.2f}", f"{r['tokens_per_s_per_gpu']:.0f}", f"{r['tflops_per_gpu']:.1f}"]
    cells += [f"{r['utilisation']:.1%}", f"{r['packing']:.1%}", f"{r['proximal_s']:.2f}", f"{r['peak_gib']:.1f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="+", type=scenario)
    parser.add_argument("--json", type=Path, help="also write the figures here, a JSON object a line")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    rate = matrix_rate()
    say(
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}, "
        f"megatron-core {megatron.core.__version__}; bf16 matrix rate {rate / 1e12:.1f} TFLOP/s\n\n| {COLUMNS} |\n"
        + "|---" * (COLUMNS.count("|") + 1)
        + "|"
    )
    for s in arguments.scenarios:
        try:
            result = run(s, rate)
        except torch.OutOfMemoryError as e:
            say(f"| {s} | out of memory: {str(e).splitlines()[0][:150]} |")
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
