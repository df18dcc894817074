#!/usr/bin/env python3
"""Measures the cost of the product's layer: generation of a whole run over that of a bare server.

    python tools/bench/bench_layer.py OUT
    python tools/bench/bench_layer.py OUT --shape tiny --cpu --concurrent 16 --new-tokens 32

A run in rollout_only mode, without a trainer: controller, rollout worker, SGLang server, reward
worker and recorder, one GPU. All responses have --new-tokens tokens. In turn and repeated, on the
same server and with --concurrent samples in flight:

    run      the product; the workflow writes down when each sample ends
    bare     the rollout worker is stopped (SIGSTOP) and this process sends SGLang the same requests
    tokens   the same without logprobs, which the product needs and other users do not

Samples that start together end together, so a figure is the rate from the end of one wave of
samples to the end of the --waves-th after it. That is the worst case for the product, which then
returns and leases a whole wave at once; with other lengths it does so while the server generates.
Prints one line of JSON per figure, then the ratios of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import aiohttp
import bench_end_to_end as end_to_end
import psutil
import yaml
from bench_parts import make_parser, start_run

from megatron_async_rl.addresses import free_port

GROUP = 8  # samples of a prompt; the first one fills the prefix cache for the others
PATIENCE_S = 600.0  # heartbeats and leases outlive the time in which the worker is stopped


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument("--shape", choices=end_to_end.SHAPES, default="1.7b")
    parser.add_argument("--concurrent", type=int, default=256, help="samples in flight")
    parser.add_argument("--new-tokens", type=int, default=400)
    parser.add_argument("--waves", type=int, default=4, help="per figure; the first does not count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_intermixed_args()
    out: Path = arguments.out.resolve()
    end_to_end.make_inputs(out, arguments.shape)
    make_weights(out / "model", arguments.cpu)
    rates: dict[str, list[float]] = {"run": [], "bare": [], "tokens": []}
    with running(out, arguments) as (port, run_dir):
        for mode in itertools.chain(*[rates] * arguments.rounds):
            if mode == "run":
                rate = rate_of_run(out / "ends", arguments)
            else:
                with stopped(run_dir):
                    key = yaml.safe_load((run_dir / "keys/rollout-0.sglang.yaml").read_text())
                    server = f"http://127.0.0.1:{port}/generate", key["api-key"]
                    rate = asyncio.run(rate_of_server(*server, mode == "bare", arguments))
            rates[mode].append(rate)
            print(json.dumps({"mode": mode, "tokens_per_s": round(rate)}), flush=True)
    medians = {mode: statistics.median(found) for mode, found in rates.items()}
    for mode in ("bare", "tokens"):
        print(json.dumps({f"run / {mode}": round(medians["run"] / medians[mode], 4)}))


def make_weights(model: Path, on_cpu: bool) -> None:
    """Writes random weights, which rollout_only does not generate by itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if any(model.glob("*.safetensors")):
        return
    dtype = torch.float32 if on_cpu else torch.bfloat16
    with torch.device("cpu" if on_cpu else "cuda"):
        weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=dtype)
    weights.save_pretrained(model)


@contextlib.contextmanager
def running(out: Path, arguments: argparse.Namespace) -> Iterator[tuple[int, Path]]:
    """Yields the server's port and run.dir of a run whose server has warmed up."""
    port, run_dir = free_port(), out / "run"
    tree = end_to_end.settings(
        out, "eta0", argparse.Namespace(**vars(arguments), workload="balanced", steps=1)
    )
    tree["run"] = {"dir": str(run_dir), "steps": end_to_end.ENDLESS, "mode": "rollout_only"}
    tree["algorithm"] |= {"prompts_per_step": 4 * arguments.concurrent // GROUP}
    tree["staleness"] = {"max_staleness": 8}
    tree["rollout"] |= {"lease_timeout_s": PATIENCE_S, "request_timeout_s": PATIENCE_S}
    tree["faults"] |= {"heartbeat_timeout_s": PATIENCE_S}
    tree["monitor"].pop("trace_steps")
    del tree["model"]["random_init"], tree["sglang"]["load_format"], tree["weights"]
    tree["sglang"] |= {"port": port}
    path, ends = out / "layer.yaml", out / "ends"
    path.write_text(yaml.safe_dump(tree))
    ends.write_bytes(b"")
    planted = {"PLANTED_MEAN": str(arguments.new_tokens), "PLANTED_SIGMA": "0"}
    with (out / "layer.log").open("w") as log:
        child = start_run(path, arguments.overrides, log, PLANTED_ENDS=str(ends), **planted)
    try:
        while len(read_ends(ends)) < 2 * arguments.concurrent:
            if child.poll() is not None:
                raise SystemExit(f"the run ended early; see {out / 'layer.log'}")
            time.sleep(0.2)
        yield port, run_dir
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(120)


def read_ends(path: Path) -> list[float]:
    return [float(line) for line in path.read_text().splitlines()]


def rate_of_run(path: Path, arguments: argparse.Namespace) -> float:
    """Returns tokens/s of the coming waves; the one that runs now may have begun before a stop."""
    wave = arguments.concurrent
    first = (len(read_ends(path)) // wave + 2) * wave
    last = first + arguments.waves * wave
    while len(ends := read_ends(path)) < last:
        time.sleep(0.2)
    return (last - first) * arguments.new_tokens / (ends[last - 1] - ends[first - 1])


@contextlib.contextmanager
def stopped(run_dir: Path) -> Iterator[None]:
    """Stops the rollout worker, but not its server, and waits for the requests in flight."""
    worker = next(
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[-2:] == [str(run_dir), "rollout-0"]
    )
    worker.suspend()
    try:
        time.sleep(10.0)
        yield
    finally:
        worker.resume()


async def rate_of_server(
    url: str, key: str, logprobs: bool, arguments: argparse.Namespace
) -> float:
    """Returns tokens/s of the server with the same load from this process."""
    request: dict[str, Any] = {
        "sampling_params": {"max_new_tokens": arguments.new_tokens, "temperature": 1.0}
    }
    request["sampling_params"]["ignore_eos"] = True
    if logprobs:
        request |= {"return_logprob": True, "logprob_start_len": -1}
    num_waves, ends = arguments.waves + 1, []
    vocabulary = range(3, end_to_end.NUM_WORDS)

    async def one_after_another(prompts: list[list[int]]) -> None:
        for ids in prompts:
            async with http.post(url, json=request | {"input_ids": ids}) as reply:
                answer = await reply.json()
                assert len(answer["output_ids"]) == arguments.new_tokens, answer
            ends.append(time.monotonic())

    def prompts() -> list[list[int]]:
        return [random.choices(vocabulary, k=end_to_end.PROMPT_WORDS) for _ in range(num_waves)]

    async with aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {key}"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
    ) as http:
        groups = [prompts() for _ in range(arguments.concurrent // GROUP)]
        await asyncio.gather(*(one_after_another(group) for group in groups * GROUP))
    ends.sort()
    num_counted = len(ends) - arguments.concurrent
    return num_counted * arguments.new_tokens / (ends[-1] - ends[arguments.concurrent - 1])


if __name__ == "__main__":
    main()
