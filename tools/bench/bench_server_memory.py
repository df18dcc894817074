#!/usr/bin/env python3
"""Compares the estimate of a server's GPU memory with the figures of a running server.

    python tools/bench/bench_server_memory.py OUT 1.7b 8b 30b-a3b:8
    python tools/bench/bench_server_memory.py OUT tiny --device cpu

Each argument is a model of bench_trainer.py, with random weights; `:N` cuts it to N layers. A
server is started for each, by the product's own SGLangServer, and asked for the memory of its
weights, its KV cache and the tokens that fit. Prints a line of JSON for each and a table at the
end; GiB are 2^30 bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench_models import make_model, shape_of
from bench_parts import memory_of, running_server
from bench_publish_setup import make_config, server_parser

from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.memory import GIB, server_memory


def main() -> None:
    parser = server_parser(__doc__)
    parser.add_argument("scenarios", nargs="+", metavar="MODEL[:LAYERS]")
    parser.set_defaults(interrupts=[], new_tokens=4032, requests=256)
    arguments = parser.parse_args()
    rows = []
    for text in arguments.scenarios:
        rows.append(asyncio.run(measure(text, arguments)))
        print(json.dumps(rows[-1]), flush=True)
    print("| model | weights, estimate | measured | KV cache, bytes a token | measured |")
    print("|---|---|---|---|---|")
    for row in rows:
        measured, expected = row["measured"], row["estimate"]
        print(
            f"| {row['scenario']} | {expected['weights_gib']:.2f} | {measured['weights_gib']:.2f} "
            f"| {expected['kv_bytes']:,.0f} | {measured['kv_bytes']:,.0f} |"
        )


async def measure(scenario: str, arguments: argparse.Namespace) -> dict[str, Any]:
    name, _, layers = scenario.partition(":")
    out: Path = arguments.out / scenario.replace(":", "-")
    shutil.rmtree(out, ignore_errors=True)
    model = make_model(out / "model", shape_of(name, layers))
    config = make_config(arguments, model, out)
    expected = server_memory(config, HfConfig(model))
    async with running_server(config, out) as server:
        used = await memory_of(server)
    return {
        "scenario": scenario,
        "estimate": {"weights_gib": expected.weights / GIB, "kv_bytes": expected.kv_per_token},
        "measured": {
            "weights_gib": used["weight"],
            "kv_bytes": used["kvcache"] * GIB / used["token_capacity"],
            "reported": used,
        },
    }


if __name__ == "__main__":
    main()
