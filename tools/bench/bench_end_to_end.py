#!/usr/bin/env python3
"""Measures whole runs with planted lengths: trained tokens per second, and where the time goes.

    python tools/bench/bench_end_to_end.py OUT           all rows of all workloads, two GPUs
    python tools/bench/bench_end_to_end.py OUT megatron.lr=0 --rows eta0 eta4 --workload generation
    python tools/bench/bench_end_to_end.py OUT --shape tiny --workload tiny --cpu --steps 4

Random weights, one SGLang server, one trainer rank, real processes. Rows (bounds first):

    bounds       the server alone: --bound-s seconds at the run's load; half of a batch to its end
    eta0         synchronous: max_staleness 0
    overlap      one-step overlap with whole batches: max_staleness 1, weights.interrupt finish
    eta1 .. eta8 max_staleness N, weights.interrupt retract, KV cache recomputed
    eta4-keep    the same with weights.kv_cache keep; also eta8-keep

Each row is a process of its own, of at most --limit-s seconds, and is kept in OUT/WORKLOAD/rows:
running again continues with the rows that are missing. A run is stopped after --steps, of which 1
and 2 do not count; it is longer, so that the last steps generate as the others do. The tables at
the end compare every row with the bounds of the same machine:

    generation   tokens/s of the server alone
    training     tokens of a step over the trainer's own seconds in eta0: the same batches, while
                 the server is idle
    ideal sync   all GPUs generate a batch, then all train it, without any cost of switching:
                 half a batch on one server, plus half of the trainer's seconds in eta0

Two groups of shares sum to 100 % of a step each. The trainer's: waits for a batch, proximal pass
(packing included), train, rest (its part of the weight update). The server's:

    pause        a weight update, measured by the rollout worker
    idle         no request, without the pause
    prefill      of interrupted samples after updates: their tokens, from the timeline of the steps
                 (monitor.trace_steps), at the prefill rate of the server alone
    KV wait      the rest, times the fraction of requests that are queued in the server
    decode       the remaining time, with the first prefill of the prompts
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import planted_lengths
import yaml
from bench_models import make_model, shape_of
from bench_parts import CPU_ENGINE, GPU_ENGINE, make_parser, running_server, start_run

from megatron_async_rl import processes
from megatron_async_rl.config import load as configuration
from megatron_async_rl.rollout.engine_client import EngineClient, Sampling

SHAPES = ("1.7b", "0.6b", "tiny")
# mean and largest length, groups of a step, samples of a group
WORKLOADS = {
    "generation": (1000, 4096, 32, 8),
    "generation-long": (2000, 8192, 32, 8),  # of the first runs; a row of eta 0 takes 12 minutes
    "balanced": (400, 2048, 32, 8),
    "balanced-600": (600, 2048, 32, 8),  # for comparison with the runs of the 0.6B shape
    "training": (150, 1024, 64, 8),
    "tiny": (24, 64, 4, 4),
}
FULL_SIZE = ["generation", "balanced", "training"]
RETRACT = {"weights.interrupt": "retract"}
KEEP = {"weights.kv_cache": "keep", "sglang.disable_overlap_schedule": True}
ROWS: dict[str, dict[str, Any]] = {
    "bounds": {},
    "eta0": {"staleness.max_staleness": 0, **RETRACT},
    "overlap": {"staleness.max_staleness": 1, "weights.interrupt": "finish"},
    **{f"eta{n}": {"staleness.max_staleness": n, **RETRACT} for n in (1, 2, 4, 8)},
    **{f"eta{n}-keep": {"staleness.max_staleness": n, **KEEP} for n in (4, 8)},
}
NUM_WORDS, PROMPT_WORDS, WARM_UP_STEPS = 5000, 96, 2
ENDLESS = 10_000  # steps: the last ones of a run start nothing new
TAGS = {
    "step_s": "perf/time/step_s",
    "wait_s": "perf/time/wait_for_batch_s",
    "proximal_s": "perf/time/proximal_s",
    "train_s": "perf/time/train_s",
    "tokens": "train/tokens",
    "staleness": "staleness/mean",
    "engine_idle": "perf/engine_idle_fraction",
    "pause_s": "sync/pause_s",
    "running": "engine/running_requests",
    "queued": "engine/queued_requests",
}
COLUMNS = (
    "row | steps | step s | tokens/s | staleness | wait | proximal | train | rest | decode "
    "| prefill | KV wait | pause | idle | over eta0 | of the bound | over ideal sync"
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every row")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--shape", choices=SHAPES, default="1.7b")
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=FULL_SIZE)
    parser.add_argument("--concurrent", type=int, default=256, help="samples in flight")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--limit-s", type=float, default=450.0, help="time limit of one row")
    parser.add_argument("--last-start-s", type=float, help="start no row after this many seconds")
    parser.add_argument("--bound-s", type=float, default=30.0)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_intermixed_args()
    out: Path = arguments.out.resolve()
    make_inputs(out, arguments.shape)
    began = time.monotonic()
    for workload in arguments.workload:
        of_workload = argparse.Namespace(**vars(arguments) | {"workload": workload})
        (out / workload / "rows").mkdir(parents=True, exist_ok=True)
        os.environ["PLANTED_MEAN"], os.environ["PLANTED_MAX"] = map(str, WORKLOADS[workload][:2])
        for row in arguments.rows:
            is_late = arguments.last_start_s and time.monotonic() > began + arguments.last_start_s
            measure(out, row, of_workload, is_late)
    for workload in WORKLOADS:
        if any((out / workload / "rows").glob("*.json")):
            print(f"\n{workload}\n\n{table(out / workload)}")


def measure(out: Path, row: str, arguments: argparse.Namespace, is_late: bool) -> None:
    """Prints a row of one workload; measures it first if it is not kept, unless `is_late`."""
    kept = out / arguments.workload / "rows" / f"{row}.json"
    found: dict[str, Any] = {"error": "not started: run the same command again"}
    if kept.exists():
        found = json.loads(kept.read_text())
    elif not is_late:
        began = time.monotonic()
        if row == "bounds":
            with processes.temporary_folder() as temporary:
                found = asyncio.run(measure_bounds(out, arguments, temporary))
        else:
            found = measure_run(out, row, arguments)
        found["took_s"] = round(time.monotonic() - began, 1)
        if "error" not in found:
            kept.write_text(json.dumps(found))
    print(json.dumps({"workload": arguments.workload, "row": row} | found), flush=True)


# ---- inputs


def make_inputs(out: Path, shape: str) -> None:
    """Writes a model folder without weights, and a dataset of random words."""
    if (out / "model").exists():
        return
    sizes = shape_of(shape) | {"tie_word_embeddings": True}
    if shape == "tiny":
        sizes["vocab_size"] = NUM_WORDS + 24
    make_model(out / "model", sizes, NUM_WORDS)
    rng = random.Random(0)
    with (out / "train.jsonl").open("w") as file:
        for _ in range(4000):
            words = " ".join(f"w{rng.randrange(NUM_WORDS)}" for _ in range(PROMPT_WORDS))
            file.write(json.dumps({"prompt": words, "answer": "1"}) + "\n")


def settings(out: Path, row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    _, most, groups, samples = WORKLOADS[arguments.workload]
    context = most + PROMPT_WORDS + 32
    engine: dict[str, Any] = GPU_ENGINE | {
        "mem_fraction_static": 0.8,
        "max_running_requests": arguments.concurrent,
    }
    tree: dict[str, Any] = {
        "run": {
            "dir": str(out / arguments.workload / "runs" / row),
            "steps": arguments.steps,
            "seed": 1,
        },
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
        "monitor": {
            "sample_tokens": 0,
            "trace_steps": list(range(WARM_UP_STEPS, arguments.steps)),
        },
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
    folder = out / arguments.workload
    path, log = folder / f"{row}.yaml", folder / f"{row}.log"
    tree = settings(out, row, arguments)
    run_dir = Path(tree["run"]["dir"])
    tree["run"]["steps"] = ENDLESS
    path.write_text(yaml.safe_dump(tree))
    with log.open("w") as output:
        child = start_run(path, [], output)
    deadline = time.monotonic() + arguments.limit_s
    last_trace = run_dir / "trace" / f"v{arguments.steps - 1}.json"
    while child.poll() is None and not last_trace.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    if child.poll() is None:
        time.sleep(2.0)  # until the last step's metrics are written
        child.send_signal(signal.SIGINT)
        child.wait(120)
    if last_trace.exists() or time.monotonic() >= deadline:
        found = step_means(run_dir, arguments.steps)
        if ROWS[row].get("weights.kv_cache") == "keep":
            found["prefill_tokens"] = 0
        return found
    return {"error": f"the run ended early; see {log}"}


def step_means(run_dir: Path, last_step: int) -> dict[str, Any]:
    """Returns means over the steps after the warm-up, up to `last_step`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    known = set(events.Tags()["scalars"])
    values = {
        name: [
            scalar.value
            for scalar in events.Scalars(tag)
            if WARM_UP_STEPS < scalar.step <= last_step
        ]
        for name, tag in TAGS.items()
        if tag in known
    }
    if not values.get("step_s"):
        return {"error": f"no step was counted; see the log beside {run_dir.parent}"}
    means = {name: statistics.fmean(found) for name, found in values.items() if found}
    means["tokens_per_s"] = sum(values["tokens"]) / sum(values["step_s"])
    if traces := list((run_dir / "trace").glob("v*.json")):
        means["prefill_tokens"] = statistics.fmean(map(prefilled_again, traces))
    rounded = {name: round(value, 3) for name, value in means.items()}
    return {"steps": len(values["step_s"])} | rounded


def prefilled_again(trace: Path) -> int:
    """Returns the tokens prefilled after weight updates, of the samples that ended in a step.

    A sample that an update interrupted is prefilled from its prompt to its newest token.
    """
    events = json.loads(trace.read_text())["traceEvents"]
    num_tokens = 0
    for runs in (event["args"].get("versions", []) for event in events if "args" in event):
        ends = itertools.accumulate((count for _, count in runs[:-1]), initial=PROMPT_WORDS)
        num_tokens += sum(list(ends)[1:])
    return num_tokens


async def measure_bounds(
    out: Path, arguments: argparse.Namespace, temporary: Path
) -> dict[str, Any]:
    """Measures the server alone: its rates at the run's load, and half of a batch to its end."""
    tree = settings(out, "bounds", arguments)
    run_dir = Path(tree["run"]["dir"])
    async with running_server(configuration.from_tree(tree), run_dir, temporary) as server:
        await at_load(server.client, arguments)  # warm-up: kernels of all batch sizes
        await server.client.flush_cache(10.0)
        found = await at_load(server.client, arguments)
        await server.client.flush_cache(10.0)
        _, _, groups, samples = WORKLOADS[arguments.workload]
        started = time.monotonic()
        half = planned_lengths(arguments)[: groups * samples // 2]
        await generate_all(server.client, [PROMPT_WORDS] * len(half), half)
        return found | {"half_batch_s": round(time.monotonic() - started, 2)}


def planned_lengths(arguments: argparse.Namespace) -> list[int]:
    samples = WORKLOADS[arguments.workload][3]
    return [planted_lengths.length(str(n), k + 1) for n in range(1000) for k in range(samples)]


async def generate_all(client: EngineClient, inputs: list[int], lengths: list[int]) -> int:
    """Generates `lengths` after inputs of so many tokens; returns the tokens, also of aborted."""
    prompts = [prompt(tokens) for tokens in inputs]
    calls = map(client.generate, prompts, [Sampling(tokens, 1.0, []) for tokens in lengths])
    outputs = await asyncio.gather(*calls)
    return sum(len(segment.ids) for output in outputs for segment in output.segments)


def prompt(num_tokens: int) -> list[int]:
    return random.choices(range(3, NUM_WORDS), k=num_tokens)


async def at_load(client: EngineClient, arguments: argparse.Namespace) -> dict[str, int]:
    """Returns the prefill and the decode rate in tokens/s, with --concurrent requests in flight.

    The first requests are as old as those of a run that goes on: of a length drawn by its tokens,
    and at a random place in it. Their first part is prefilled before the clock of the decode rate
    starts, and is then in the prefix cache.
    """
    random.seed(0)
    lengths = planned_lengths(arguments)
    running = random.choices(lengths, weights=lengths, k=arguments.concurrent)
    begun = [prompt(PROMPT_WORDS + random.randrange(tokens)) for tokens in running]
    left = [PROMPT_WORDS + tokens - len(ids) for ids, tokens in zip(begun, running, strict=True)]
    started = time.monotonic()
    await asyncio.gather(*(client.generate(ids, Sampling(1, 1.0, [])) for ids in begun))
    prefill_s = time.monotonic() - started
    queue, started = iter(lengths), time.monotonic()
    stopped = started + arguments.bound_s

    async def one_after_another(ids: list[int], tokens: int) -> int:
        output = await client.generate(ids, Sampling(tokens, 1.0, []))
        num_tokens = sum(len(segment.ids) for segment in output.segments)
        for tokens in queue:
            if time.monotonic() > stopped:
                break
            num_tokens += await generate_all(client, [PROMPT_WORDS], [tokens])
        return num_tokens

    tasks = [
        asyncio.create_task(one_after_another(*request))
        for request in zip(begun, left, strict=True)
    ]
    await asyncio.sleep(arguments.bound_s)
    seconds = time.monotonic() - started
    await client.abort_all()
    num_tokens = sum(await asyncio.gather(*tasks))
    return {
        "prefill_tokens_per_s": round(sum(map(len, begun)) / prefill_s),
        "tokens_per_s": round(num_tokens / seconds),
    }


# ---- the table


def table(folder: Path) -> str:
    rows = {path.stem: json.loads(path.read_text()) for path in (folder / "rows").glob("*.json")}
    bounds, synchronous = rows.get("bounds"), rows.get("eta0")
    lines = [f"| {COLUMNS} |", "|---" * (COLUMNS.count("|") + 1) + "|"]
    bound = ideal = None
    if bounds and synchronous:
        busy_s = synchronous["train_s"] + synchronous["proximal_s"]
        training = synchronous["tokens"] / busy_s
        bound = min(bounds["tokens_per_s"], training)
        ideal_s = bounds["half_batch_s"] + busy_s / 2
        ideal = synchronous["tokens"] / ideal_s
        lines.insert(
            0,
            f"bounds, tokens/s: generation {bounds['tokens_per_s']:,} (prefill "
            f"{bounds['prefill_tokens_per_s']:,}), training {training:,.0f}; ideal sync "
            f"{ideal:,.0f}, a step of {ideal_s:.1f} s\n",
        )
    others = (synchronous and synchronous["tokens_per_s"], bound, ideal)
    for name in ROWS:
        if name == "bounds" or name not in rows:
            continue
        row = rows[name]
        shares = trainer_shares(row) + server_shares(row, bounds)
        cells = [
            name,
            str(row["steps"]),
            f"{row['step_s']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['staleness']:.2f}",
            *("" if share is None else f"{share:.0%}" for share in shares),
            *(f"{row['tokens_per_s'] / other:.2f}" if other else "" for other in others),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trainer_shares(row: dict[str, Any]) -> list[float]:
    shares = [row[part] / row["step_s"] for part in ("wait_s", "proximal_s", "train_s")]
    return [*shares, 1 - sum(shares)]


def server_shares(row: dict[str, Any], bounds: dict[str, Any] | None) -> list[float | None]:
    """Returns decode, prefill, KV wait, pause, idle as fractions of a step; None without bounds."""
    if bounds is None or "engine_idle" not in row:
        return [None] * 5
    step_s = row["step_s"]
    pause = row["pause_s"] / step_s
    idle = max(row["engine_idle"] - pause, 0.0)
    prefill = row.get("prefill_tokens", 0) / bounds["prefill_tokens_per_s"] / step_s
    left = 1 - pause - idle - prefill
    requests = row.get("running", 0.0) + row.get("queued", 0.0)
    waits = left * row.get("queued", 0.0) / requests if requests else 0.0
    return [left - waits, prefill, waits, pause, idle]


if __name__ == "__main__":
    main()
