#!/usr/bin/env python3
"""Measures whole runs with planted lengths: trained tokens per second, and where the time goes.

    python tools/bench/bench_end_to_end.py OUT                          all rows, two GPUs
    python tools/bench/bench_end_to_end.py OUT megatron.lr=0 --rows eta0 eta4 --workload generation
    python tools/bench/bench_end_to_end.py OUT --shape tiny --cpu --steps 4

Random weights, one SGLang server, one trainer rank, real processes. Rows (bounds first):

    bounds       the server alone: --bound-s seconds at the run's load; half of a batch to its end
    eta0         synchronous: max_staleness 0
    overlap      one-step overlap with whole batches: max_staleness 1, weights.interrupt finish
    eta1 .. eta8 max_staleness N, weights.interrupt retract, KV cache recomputed
    eta4-keep    the same with weights.kv_cache keep

Each row is a process of its own, of at most --limit-s seconds, and is kept in OUT/rows: running
again continues with the rows that are missing. Steps 1 and 2 do not count. The table at the end
compares every row with the bounds of the same machine:

    generation   tokens/s of the server alone
    training     tokens of a step over the trainer's own seconds in eta0, where the server is idle
    ideal sync   all GPUs generate a batch, then all train it, without any cost of switching:
                 half a batch on one server, plus half of the trainer's seconds in eta0
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import planted_lengths
import yaml
from bench_publish_setup import CPU_ENGINE

from megatron_async_rl.config import load as configuration
from megatron_async_rl.rollout.engine_client import EngineClient, Sampling
from megatron_async_rl.rollout.engine_process import SGLangServer

SHAPES: dict[str, tuple[int, ...]] = {  # hidden, MLP, layers, heads, key-value heads, head size
    "1.7b": (2048, 6144, 28, 16, 8, 128),
    "0.6b": (1024, 3072, 28, 16, 8, 128),
    "tiny": (64, 128, 2, 4, 2, 32),
}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
# mean and largest length, groups of a step, samples of a group
WORKLOADS = {
    "generation": (2000, 8192, 32, 8),
    "balanced": (600, 2048, 32, 8),
    "training": (150, 1024, 64, 8),
    "tiny": (24, 64, 4, 4),
}
RETRACT = {"weights.interrupt": "retract"}
ROWS: dict[str, dict[str, Any]] = {
    "bounds": {},
    "eta0": {"staleness.max_staleness": 0, **RETRACT},
    "overlap": {"staleness.max_staleness": 1, "weights.interrupt": "finish"},
    **{f"eta{n}": {"staleness.max_staleness": n, **RETRACT} for n in (1, 2, 4, 8)},
    "eta4-keep": {
        "staleness.max_staleness": 4,
        "weights.kv_cache": "keep",
        "sglang.disable_overlap_schedule": True,
    },
}
NUM_WORDS, PROMPT_WORDS, WARM_UP_STEPS = 5000, 96, 2
TAGS = {
    "step_s": "perf/time/step_s",
    "wait_s": "perf/time/wait_for_batch_s",
    "proximal_s": "perf/time/proximal_s",
    "train_s": "perf/time/train_s",
    "tokens": "train/tokens",
    "staleness": "staleness/mean",
    "engine_idle": "perf/engine_idle_fraction",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every row")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--shape", choices=list(SHAPES), default="1.7b")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="balanced")
    parser.add_argument("--concurrent", type=int, default=256, help="samples in flight")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--limit-s", type=float, default=450.0, help="of one row")
    parser.add_argument("--bound-s", type=float, default=30.0)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_intermixed_args()
    out: Path = arguments.out.resolve()
    (out / "rows").mkdir(parents=True, exist_ok=True)
    make_inputs(out, arguments.shape)
    os.environ["PLANTED_MEAN"], os.environ["PLANTED_MAX"] = map(
        str, WORKLOADS[arguments.workload][:2]
    )
    for row in arguments.rows:
        kept = out / "rows" / f"{row}.json"
        if not kept.exists():
            began = time.monotonic()
            if row == "bounds":
                found = asyncio.run(measure_bounds(out, arguments))
            else:
                found = measure_run(out, row, arguments)
            found["took_s"] = round(time.monotonic() - began, 1)
            kept.write_text(json.dumps(found))
        print(json.dumps({"row": row} | json.loads(kept.read_text())), flush=True)
    print(table(out))


# ---- inputs


def make_inputs(out: Path, shape: str) -> None:
    """Writes a model folder without weights, and a dataset of random words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = out / "model"
    if model.exists():
        return
    model.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": 0,
        **dict(zip(SIZES, SHAPES[shape], strict=True)),
        "vocab_size": 151936 if shape != "tiny" else NUM_WORDS + 24,
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    vocabulary = {"<end>": 0, "<pad>": 1, "<unk>": 2}
    vocabulary |= {f"w{number}": number + 3 for number in range(NUM_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(model / "tokenizer.json"))
    rng = random.Random(0)
    with (out / "train.jsonl").open("w") as file:
        for _ in range(4000):
            words = " ".join(f"w{rng.randrange(NUM_WORDS)}" for _ in range(PROMPT_WORDS))
            file.write(json.dumps({"prompt": words, "answer": "1"}) + "\n")


def settings(out: Path, row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    _, most, groups, samples = WORKLOADS[arguments.workload]
    context = most + PROMPT_WORDS + 32
    engine: dict[str, Any] = {
        "dtype": "bfloat16",
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
        "mem_fraction_static": 0.8,
        "max_running_requests": arguments.concurrent,
    }
    tree: dict[str, Any] = {
        "run": {"dir": str(out / "runs" / row), "steps": arguments.steps, "seed": 1},
        "model": {"path": str(out / "model"), "context_tokens": context, "random_init": True},
        "data": {"train": str(out / "train.jsonl")},
        "rollout": {
            "max_new_tokens": most,
            "max_concurrent_samples": arguments.concurrent,
            "workflow": "planted_lengths:PlantedLengths",
        },
        "reward": {"function": "planted_lengths:coin"},
        "algorithm": {"prompts_per_step": groups, "samples_per_prompt": samples, "minibatches": 2},
        "trainer": {
            "precision": "fp32" if arguments.cpu else "bf16",
            "max_tokens_per_microbatch": max(16384, context) if not arguments.cpu else 2048,
        },
        "checkpoint": {"every": 0},
        "monitor": {"sample_tokens": 0},
        "faults": {"shutdown_grace_s": 5},
        "megatron": {"lr": 1e-7, "clip_grad": 1.0},
        "sglang": (CPU_ENGINE if arguments.cpu else engine) | {"load_format": "dummy"},
    }
    for name, value in ROWS[row].items():
        section, key = name.split(".")
        tree.setdefault(section, {})[key] = value
    for text in arguments.overrides:
        name, _, value = text.partition("=")
        section, key = name.split(".", 1)
        tree.setdefault(section, {})[key] = yaml.safe_load(value)
    return tree


# ---- rows


def measure_run(out: Path, row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a row and returns the means of its counted steps."""
    path = out / f"{row}.yaml"
    path.write_text(yaml.safe_dump(settings(out, row, arguments)))
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    log = (out / f"{row}.log").open("w")
    child = subprocess.Popen(
        [sys.executable, "-m", "megatron_async_rl", "run", str(path), "--from-scratch"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        child.wait(arguments.limit_s)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        child.wait(60)
    return step_means(out / "runs" / row)


def step_means(run_dir: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    known = set(events.Tags()["scalars"])
    values = {
        name: [scalar.value for scalar in events.Scalars(tag) if scalar.step > WARM_UP_STEPS]
        for name, tag in TAGS.items()
        if tag in known
    }
    if not values.get("step_s"):
        return {"steps": 0, "error": f"no step was counted; see the log beside {run_dir}"}
    means = {name: statistics.fmean(found) for name, found in values.items() if found}
    means["tokens_per_s"] = sum(values["tokens"]) / sum(values["step_s"])
    rounded = {name: round(value, 3) for name, value in means.items()}
    return {"steps": len(values["step_s"])} | rounded


async def measure_bounds(out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the server alone: its rate at the run's load, and half of a batch to its end."""
    tree = settings(out, "bounds", arguments)
    run_dir = Path(tree["run"]["dir"])
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    (run_dir / "keys").mkdir(mode=0o700, exist_ok=True)
    server = SGLangServer(configuration.from_tree(tree), run_dir, "rollout-0")
    try:
        await server.start()
        await server.client.relabel(0)
        lengths = planned_lengths(arguments)
        await closed_loop(server.client, lengths, arguments)  # warm-up: kernels of all batch sizes
        rate = await closed_loop(server.client, lengths, arguments)
        await server.client.flush_cache(10.0)
        _, _, groups, samples = WORKLOADS[arguments.workload]
        started = time.monotonic()
        await generate_all(server.client, lengths[: groups * samples // 2])
        return {"tokens_per_s": rate, "half_batch_s": round(time.monotonic() - started, 2)}
    finally:
        await server.stop()


def planned_lengths(arguments: argparse.Namespace) -> list[int]:
    samples = WORKLOADS[arguments.workload][3]
    return [planted_lengths.length(str(n), k + 1) for n in range(1000) for k in range(samples)]


async def generate_all(client: EngineClient, lengths: list[int]) -> int:
    """Generates responses of these lengths at once; returns the tokens, also of aborted ones."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, NUM_WORDS) for _ in range(PROMPT_WORDS)] for _ in lengths]
    calls = map(client.generate, prompts, [Sampling(tokens, 1.0, []) for tokens in lengths])
    outputs = await asyncio.gather(*calls)
    return sum(len(segment.ids) for output in outputs for segment in output.segments)


async def closed_loop(
    client: EngineClient, lengths: list[int], arguments: argparse.Namespace
) -> int:
    """Keeps --concurrent requests in flight; returns tokens per second."""
    queue, started = iter(lengths), time.monotonic()
    stopped = started + arguments.bound_s

    async def one_after_another() -> int:
        num_tokens = 0
        for tokens in queue:
            num_tokens += await generate_all(client, [tokens])
            if time.monotonic() > stopped:
                break
        return num_tokens

    workers = [asyncio.create_task(one_after_another()) for _ in range(arguments.concurrent)]
    await asyncio.sleep(arguments.bound_s)
    seconds = time.monotonic() - started
    await client.abort_all()
    return round(sum(await asyncio.gather(*workers)) / seconds)


# ---- the table


def table(out: Path) -> str:
    rows = {path.stem: json.loads(path.read_text()) for path in (out / "rows").glob("*.json")}
    bounds, synchronous = rows.get("bounds"), rows.get("eta0")
    lines = [
        "| row | steps | step s | tokens/s | wait | proximal | train | rest | engine idle "
        "| over eta0 | of the bound | over ideal sync |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    bound = ideal = None
    if bounds and synchronous and synchronous["steps"]:
        busy_s = synchronous["train_s"] + synchronous["proximal_s"]
        bound = min(bounds["tokens_per_s"], synchronous["tokens"] / busy_s)
        ideal = synchronous["tokens"] / (bounds["half_batch_s"] + busy_s / 2)
        lines.insert(
            0,
            f"bounds, tokens/s: generation {bounds['tokens_per_s']:,}, training "
            f"{synchronous['tokens'] / busy_s:,.0f}, ideal sync {ideal:,.0f}\n",
        )
    for name in ROWS:
        row = rows.get(name)
        if name == "bounds" or row is None or not row["steps"]:
            continue
        shares = [row[part] / row["step_s"] for part in ("wait_s", "proximal_s", "train_s")]
        shares.append(1 - sum(shares))
        rate = row["tokens_per_s"]
        ratios = [
            rate / other if other else None
            for other in (synchronous and synchronous.get("tokens_per_s"), bound, ideal)
        ]
        cells = [
            name,
            str(row["steps"]),
            f"{row['step_s']:.1f}",
            f"{rate:,.0f}",
            *(f"{share:.0%}" for share in shares),
            f"{row['engine_idle']:.0%}" if "engine_idle" in row else "",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
