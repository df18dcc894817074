#!/usr/bin/env python3
"""Measures the cost of the HTTP endpoint of agents over direct generation on the same server.

    python tools/bench/bench_agents.py OUT --model 8b
    python tools/bench/bench_agents.py OUT --model tiny --device cpu --sessions 16 --turns 4

One SGLang server with random weights. Per mode, in turn and repeated: --sessions conversations at
once of --turns turns of --new-tokens tokens, each turn followed by --user-tokens tokens.

    direct     the product's Generator, from ids to ids
    endpoint   OpenAI's chat completions in the product's Endpoint; the clients are another process

Prints one line of JSON per round: tokens per second, and CPU per request of the process that a
rollout worker would be. Then the ratio of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import aiohttp
import numpy as np
from bench_models import SHAPES, make_model
from bench_parts import running_server
from bench_publish_setup import make_config, server_parser
from msgspec import structs

from megatron_async_rl.config.datasets import DataConfig
from megatron_async_rl.config.sections import SandboxConfig
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.rollout.agents.server import Endpoint
from megatron_async_rl.rollout.agents.session import Session, SessionSettings
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.generation import Generator
from megatron_async_rl.rollout.python_runner import PythonRunner
from megatron_async_rl.rollout.workflow import Completion

SPECIAL = ["<end>", "<pad>", "<unk>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def main() -> None:
    parser = server_parser(__doc__)
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--user-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--client", metavar="URL", help="internal: run the process of the clients")
    parser.set_defaults(interrupts=[])  # for make_config
    arguments = parser.parse_args()
    arguments.requests = arguments.sessions
    asyncio.run(run_clients(arguments) if arguments.client else benchmark(arguments))


class EnginePolicy:
    """The policy that sessions see: the product's Generator on one server, without leases."""

    def __init__(self, tokenizer: Tokenizer, generator: Generator) -> None:
        self.tokenizer, self.generator = tokenizer, generator

    async def generate(self, ids: list[int], sampling: Sampling) -> Completion:
        return await self.generator.generate(ids, sampling)


async def benchmark(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    model = make_model(out / "model", SHAPES[arguments.model])
    write_tokenizer(model, SHAPES[arguments.model]["vocab_size"])
    length = (arguments.new_tokens + arguments.user_tokens + 4) * arguments.turns + 8
    config = make_config(arguments, model, out)
    config = structs.replace(config, model=structs.replace(config.model, context_tokens=length))
    rows: dict[str, list[dict[str, Any]]] = {"direct": [], "endpoint": []}
    async with running_server(config, out) as server:
        tokenizer, gate = Tokenizer(model), Gate()
        gate.open()
        generator = Generator(
            server.client,
            gate,
            lambda: None,
            length,
            SHAPES[arguments.model]["vocab_size"],
            tokenizer.decode_all,
        )
        generator._gate.open()
        policy = EnginePolicy(tokenizer, generator)
        await through_endpoint(policy, arguments, 0, lambda: None)  # warm-up
        for number in range(arguments.rounds):
            for mode, converse in (("direct", direct), ("endpoint", through_endpoint)):
                await server.client.flush_cache(10.0)
                row = await measured(converse, policy, arguments, 2 * number + (mode == "direct"))
                rows[mode].append(row)
                print(json.dumps({"mode": mode} | row), flush=True)
    medians = {
        mode: statistics.median(row["tokens_per_s"] for row in found)
        for mode, found in rows.items()
    }
    print(json.dumps({"endpoint / direct": round(medians["endpoint"] / medians["direct"], 4)}))


async def measured(
    converse: Any, policy: EnginePolicy, arguments: argparse.Namespace, seed: int
) -> dict[str, Any]:
    before, begun = policy.generator.num_tokens, []

    def begin() -> None:
        begun.extend([time.monotonic(), time.process_time()])

    await converse(policy, arguments, seed, begin)
    seconds, cpu_s = time.monotonic() - begun[0], time.process_time() - begun[1]
    num_requests = arguments.sessions * arguments.turns
    return {
        "seconds": round(seconds, 2),
        "tokens_per_s": round((policy.generator.num_tokens - before) / seconds),
        "cpu_us_per_request": round(1e6 * cpu_s / num_requests),
    }


def user_ids(arguments: argparse.Namespace, seed: int) -> list[list[list[int]]]:
    """Returns the users' tokens [sessions][turns]."""
    vocab_size = SHAPES[arguments.model]["vocab_size"]
    shape = (arguments.sessions, arguments.turns, arguments.user_tokens)
    return np.random.default_rng(seed).integers(len(SPECIAL), vocab_size, shape).tolist()


async def direct(
    policy: EnginePolicy, arguments: argparse.Namespace, seed: int, begin: Callable[[], None]
) -> None:
    sampling = Sampling(arguments.new_tokens, 1.0, [])

    async def converse(turns: list[list[int]]) -> None:
        ids: list[int] = []
        for user in turns:
            ids += [3, *user, 0, 4]  # as the chat template writes it
            ids += (await policy.generate(ids, sampling)).ids

    ids = user_ids(arguments, seed)
    begin()
    await asyncio.gather(*map(converse, ids))


async def through_endpoint(
    policy: EnginePolicy, arguments: argparse.Namespace, seed: int, begin: Callable[[], None]
) -> None:
    endpoint = Endpoint("127.0.0.1")
    await endpoint.start()
    try:
        sampling = Sampling(arguments.new_tokens, 1.0, [])
        python = PythonRunner(SandboxConfig())
        settings = SessionSettings(DataConfig(train="-"), arguments.turns, python)
        sessions = [
            Session(policy, sampling, settings)  # type: ignore[arg-type]
            for _ in range(arguments.sessions)
        ]
        for session in sessions:
            endpoint.open(session)
        command = [sys.executable, __file__, str(arguments.out), "--client", endpoint.url]
        pipe = asyncio.subprocess.PIPE
        clients = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        assert clients.stdout
        ids = user_ids(arguments, seed)
        texts = [["".join(map(word, turn)) for turn in turns] for turns in ids]
        keys = [session.key for session in sessions]
        await clients.stdout.readline()  # its modules are imported
        begin()
        await clients.communicate(json.dumps([keys, texts]).encode())
        if clients.returncode:
            raise SystemExit("the clients failed")
        branches = sum(session.transcript.num_sequences for session in sessions)
        assert branches == arguments.sessions, f"{branches} sequences"
    finally:
        await endpoint.stop()


async def run_clients(arguments: argparse.Namespace) -> None:
    print("ready", flush=True)
    keys, texts = json.load(sys.stdin)
    url = f"{arguments.client}/v1/chat/completions"

    async def converse(key: str, turns: list[str]) -> None:
        messages: list[dict[str, str]] = []
        for text in turns:
            messages.append({"role": "user", "content": text})
            headers = {"Authorization": f"Bearer {key}"}
            async with http.post(url, json={"messages": messages}, headers=headers) as reply:
                answer = await reply.json()
                assert reply.status == 200, answer
            messages.append(answer["choices"][0]["message"])

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=timeout
    ) as http:
        await asyncio.gather(*map(converse, keys, texts))


def word(token: int) -> str:
    return SPECIAL[token] if token < len(SPECIAL) else f"w{token} "


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a tokenizer of one word per token id, so that sampled ids become texts and back."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {word(token): token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"w[0-9]+ "), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
