#!/usr/bin/env python3
"""Measures tokens per second of one SGLang server, undisturbed and with pauses of weight updates.

    python tools/bench/bench_rollout.py OUT --model 8b --sglang attention_backend=fa3
    python tools/bench/bench_rollout.py OUT --model 8b --interrupts none retract keep \
        --sglang attention_backend=fa3 disable_overlap_schedule=true
    python tools/bench/bench_rollout.py OUT --model tiny --device cpu --requests 16

Random weights that do not change; the server is started, paused and queried by the product's own
SGLangServer and EngineClient. For each interruption mode: --requests new samples, --pauses times
--gap-s seconds of generation and a pause that ends at once; then all are aborted and their tokens
counted.
`pause_ms` is the time until the engine has ended the running batch and (retract) queued its
requests again, which is when an update could send its first byte. Prints one line of JSON per mode.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
from bench_models import SHAPES, make_model
from bench_parts import running_server
from bench_publish_setup import PROMPT_TOKENS, make_config, server_parser

from megatron_async_rl.rollout.engine_client import EngineClient, Sampling
from megatron_async_rl.rollout.interruption import Pause

MODES: dict[str, Literal["retract", "in_place"]] = {"retract": "retract", "keep": "in_place"}


def main() -> None:
    parser = server_parser(__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=2048)
    parser.add_argument(
        "--interrupts", nargs="+", choices=["none", *MODES], default=["none", "retract"]
    )
    parser.add_argument("--pauses", type=int, default=3)
    parser.add_argument("--gap-s", type=float, default=5.0)
    asyncio.run(benchmark(parser.parse_args()))


async def benchmark(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    model = make_model(out / "model", SHAPES[arguments.model])
    async with running_server(make_config(arguments, model, out), out) as server:
        # warm-up: compiles kernels, allocates memory
        await generate(server.client, arguments, "none", num_pauses=1)
        for interrupt in arguments.interrupts:
            row = await generate(server.client, arguments, interrupt, arguments.pauses)
            print(json.dumps({"sglang": arguments.sglang} | row), flush=True)


async def generate(
    client: EngineClient, arguments: argparse.Namespace, interrupt: str, num_pauses: int
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(
        3, SHAPES[arguments.model]["vocab_size"], (arguments.requests, PROMPT_TOKENS)
    ).tolist()
    sampling = Sampling(arguments.new_tokens, 1.0, [])
    started = time.monotonic()
    samples = [asyncio.create_task(client.generate(prompt, sampling)) for prompt in prompts]
    pauses = []
    for _ in range(num_pauses):
        await asyncio.sleep(arguments.gap_s)
        if interrupt in MODES:
            pauses.append(await pause_once(client, interrupt))
    seconds = time.monotonic() - started
    num_ended = sum(sample.done() for sample in samples)
    await client.abort_all()
    num_tokens = [
        sum(len(segment.ids) for segment in part.segments)
        for part in await asyncio.gather(*samples)
    ]
    await client.flush_cache(10.0)
    return {
        "interrupt": interrupt,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(sum(num_tokens) / seconds),
        "tokens_per_sample_median": statistics.median(num_tokens),
        "num_finished": num_ended,
        "pause_ms": [round(1000 * pause) for pause in pauses],
    }


async def pause_once(client: EngineClient, interrupt: str) -> float:
    """Returns the seconds until the engine is ready to receive weights."""
    way = Pause(client, MODES[interrupt])
    started = time.monotonic()
    await way.stop()
    await client.begin_update()
    seconds = time.monotonic() - started
    await client.end_update()
    await way.resume()
    return seconds


if __name__ == "__main__":
    main()
