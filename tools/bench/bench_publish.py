#!/usr/bin/env python3
"""Measures a weight update: live Megatron shards to a live SGLang server while it generates.

    bench="python tools/bench/bench_publish.py OUT --model 8b"
    $bench --buckets 2147483648 1073741824               # 2 GPUs: trainer TP=1, engine tp=1
    $bench --interrupts abort retract                    # SGLang >= 0.5.21
    $bench --interrupts abort retract --no-radix-cache   # any SGLang
    $bench --trainer-tp 2 --engine-tp 2                  # 4 GPUs
    $bench --trainer-tp 2 --engine-gpu 1                 # 2 GPUs, the engine shares one with rank 1
    python tools/bench/bench_publish.py OUT --model tiny --device cpu       # on a laptop, with gloo

The parts are the product's: WeightPublisher in trainer ranks with megatron-core's model (random
weights, no optimizer), BroadcastPublisher behind a Hub in this process, and a rollout worker with
its SGLang server that always has --requests samples leased. For comparison, a plain broadcast of
the same bytes in buckets of the same size, from the first GPU of the trainer to the first of the
engine, before the engine allocates its memory. Writes OUT/updates.json and OUT/table.md.

Phases of an update, in seconds, as the publisher reports them:

    interrupt       the gate is closed and all requests are aborted, or the engine is paused
    drain           until the last aborted request has been answered
    load            from then on, all buckets are received and loaded (measured by the server)
    first_bucket    the part of load until the first bucket: a server that aborts waits for the
                    drain in it, one that retracts for its requests to be queued again
    wire            the same measured by the trainer, from the first gather to the last byte sent
    gather          on the trainer's GPU, inside wire; trainer_digest too
    flush           the prefix cache is dropped, where that is a separate call
    digest          the server's checksums and their comparison
    resume          until the engine has been told to continue
    pause           from closing the gate to opening it, in the rollout worker
    total           from the controller's first message to its last

Each bucket size is measured twice: with an idle server, which gives the rate of the wire, and with
--requests running, for each interruption mode. With --no-radix-cache the engine has no prefixes
that could be stale, so that one before 0.5.21 can retract too (its tokens carry no versions and
could not be trained).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import bench_publish_roles
from bench_control import environment, of_rank
from bench_models import SHAPES, make_model
from bench_parts import make_run_folder
from bench_publish_control import Bench
from bench_publish_setup import make_config, server_parser

from megatron_async_rl import processes
from megatron_async_rl.addresses import free_port
from megatron_async_rl.config import load as configuration
from megatron_async_rl.errors import Error
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.shape import num_parameters

PHASES = (
    *("interrupt", "drain", "gather", "trainer_digest", "wire", "first_bucket"),
    *("load", "flush", "digest", "resume", "pause", "total"),
)


def table(rows: list[dict[str, Any]], plain: dict[int, float]) -> str:
    """Returns one line per kind of update: medians without the first update, in milliseconds."""
    columns = [
        "bucket GB",
        "wire",
        "interrupt",
        "interrupted",
        "digests",
        "updates",
        *(f"{phase} ms" for phase in PHASES),
    ]
    columns += ["GB/s", "plain GB/s", "share", "peak GB", "worst pause ms"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    kinds = ("busy", "gap_s", "bucket_bytes", "wire", "interrupt", "verified")
    for kind in sorted({tuple(row[name] for name in kinds) for row in rows}):
        busy, gap_s, size, wire, interrupt, verified = kind
        chosen = [
            row for row in rows if tuple(row[name] for name in kinds) == kind and not row["first"]
        ]
        if not chosen:
            continue
        seconds = {
            phase: statistics.median(r["seconds"].get(phase, 0.0) for r in chosen)
            for phase in PHASES
        }
        rate = chosen[0]["bytes"] / seconds["wire"] / 1e9
        plain_rate = chosen[0]["bytes"] / plain[size] / 1e9 if size in plain else float("nan")
        cells = [
            f"{gap_s:g}" if busy else "",
            f"{size / 1e9:.2f}",
            wire,
            interrupt,
            f"{statistics.median(r['interrupted'] for r in chosen):.0f}",
        ]
        cells += ["yes" if verified else "no", str(len(chosen))]
        cells += [f"{1000 * seconds[phase]:.1f}" for phase in PHASES]
        cells += (
            ["", "", ""]
            if busy
            else [f"{rate:.1f}", f"{plain_rate:.1f}", f"{rate / plain_rate:.2f}"]
        )
        cells += [f"{max(r['peak_bytes'] for r in chosen) / 1e9:.2f}"]
        cells += [f"{1000 * max(r['seconds']['pause'] for r in chosen):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = server_parser(__doc__)
    parser.add_argument("--trainer-tp", type=int, default=1)
    parser.add_argument(
        "--engine-gpu",
        type=int,
        help="the engine's first GPU; default: the first without a trainer rank",
    )
    parser.add_argument(
        "--buckets",
        nargs="+",
        default=["2147483648"],
        help="bytes, or bytes:tensor for weights.broadcast_unit",
    )
    parser.add_argument(
        "--interrupts", nargs="+", choices=["abort", "retract", "keep"], default=["abort"]
    )
    parser.add_argument(
        "--no-radix-cache", action="store_true", help="an engine without prefix cache"
    )
    parser.add_argument(
        "--updates", type=int, default=7, help="per round; every second update verifies digests"
    )
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=4096)
    parser.add_argument(
        "--gap-s",
        type=float,
        nargs="+",
        default=[6.0],
        help="seconds of generation between updates",
    )
    parser.add_argument(
        "--kill", action="store_true", help="at the end, kill the server during an update"
    )
    parser.add_argument(
        "--role",
        choices=["trainer", "rollout", "baseline"],
        help="used for the processes that this tool starts",
    )
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--total-bytes", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.role == "trainer":
        bench_publish_roles.trainer(arguments)
    elif arguments.role == "rollout":
        processes.main(lambda: bench_publish_roles.rollout(arguments))
    elif arguments.role == "baseline":
        a = arguments
        bench_publish_roles.baseline(a.rank, a.port, a.device, a.buckets, a.total_bytes)
    else:
        asyncio.run(benchmark(arguments))


def start(
    arguments: argparse.Namespace, name: str, command: list[str], gpus: range, **extra: str
) -> Any:
    visible = ",".join(map(str, gpus)) if arguments.device == "cuda" else None
    log = arguments.out / "logs" / f"{name}.log"
    return processes.start(command, log, environment(visible) | extra)


async def benchmark(arguments: argparse.Namespace) -> None:
    out = arguments.out
    make_run_folder(out)
    config = make_config(arguments, make_model(out / "model", SHAPES[arguments.model]), out)
    (out / "config.yaml").write_text(configuration.dump(config))
    trainer_gpus = range(arguments.trainer_tp)
    first = arguments.trainer_tp if arguments.engine_gpu is None else arguments.engine_gpu
    engine_gpus = range(first, first + arguments.engine_tp)
    bench = Bench(arguments)
    children: list[subprocess.Popen[bytes]] = []
    me = [sys.executable, __file__, str(out), "--updates", str(arguments.updates)]
    me += ["--buckets", *arguments.buckets, "--gap-s", *map(str, arguments.gap_s)]
    me += ["--interrupts", *arguments.interrupts]
    me += ["--no-radix-cache"] if arguments.no_radix_cache else []
    try:
        children.append(start(arguments, "rollout-0", [*me, "--role", "rollout"], engine_gpus))
        plain = await measure_plain(arguments, me, trainer_gpus, engine_gpus)
        port = free_port()
        command = [*me, "--role", "trainer", *(["--kill"] if arguments.kill else [])]
        for rank in trainer_gpus:
            ranks = of_rank(rank, arguments.trainer_tp, port)
            children.append(start(arguments, f"trainer-{rank}", command, trainer_gpus, **ranks))
        bench.rollout_pid = children[0].pid
        loops = [asyncio.create_task(loop()) for loop in (bench.run, bench.receive)]
        loops.append(
            asyncio.create_task(until_one_fails(children[1:] if arguments.kill else children))
        )
        done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
        for task in loops[1:]:
            task.cancel()
        text = table(next(iter(done)).result(), plain)
        (out / "table.md").write_text(text)
        print(
            text,
            f"samples failed: {bench.num_failed}, tokens generated: {bench.num_generated}",
            sep="",
        )
    finally:
        await bench.close()
        processes.stop(children, 10.0)


async def measure_plain(
    arguments: argparse.Namespace, command: list[str], trainer_gpus: range, engine_gpus: range
) -> dict[int, float]:
    """Returns the seconds of a plain broadcast by bucket size."""
    parameters = num_parameters(HfConfig(arguments.out / "model").shape())
    total = str(parameters * (4 if arguments.device == "cpu" else 2))
    more = ["--role", "baseline", "--device", arguments.device, "--total-bytes", total]
    more += ["--port", str(free_port())]
    pair = [
        start(arguments, f"baseline-{rank}", [*command, *more, "--rank", str(rank)], gpus[:1])
        for rank, gpus in enumerate((trainer_gpus, engine_gpus))
    ]
    try:
        deadline = time.monotonic() + 150
        while any(child.poll() is None for child in pair) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
    finally:
        processes.stop(pair, 3.0)
    seconds = bench_publish_roles.baseline_seconds(arguments.out / "logs" / "baseline-0.log")
    print("plain broadcast, seconds by bucket size:", seconds, flush=True)
    return seconds


async def until_one_fails(children: list[subprocess.Popen[bytes]]) -> None:
    while not any(child.poll() for child in children):
        await asyncio.sleep(0.5)
    raise Error("a process of the benchmark ended; see logs/ in its folder")


if __name__ == "__main__":
    main()
