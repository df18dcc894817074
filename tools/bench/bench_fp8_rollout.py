#!/usr/bin/env python3
"""Measures servers with bf16 weights and with block-scaled fp8 ones (weights.quantization).

    bench=tools/bench/bench_fp8_rollout.py
    python $bench OUT --model 8b                                 # 2 GPUs: trainer, servers
    python $bench OUT --model 1.7b --transport disk --gpus 0     # all on one GPU
    python $bench OUT --model 8b --parts decode --fp8-gemm auto  # DeepGEMM, where it is installed
    python $bench OUT --model tiny --cpu                         # on a laptop, with gloo

One trainer rank with random weights (megatron-core's model, without optimizer) and two SGLang
servers, one per format; all run the product's code. Both servers get the trainer's weights before
anything is measured, and keep to one GPU: only one of them works at a time.

    update    trainer -> server, in turn: seconds by phase (as in bench_publish.py), bytes, and
              whether the server's digests are the trainer's
    decode    output tokens/s of --loads requests at once with --new-tokens each, in turn
    mismatch  --samples responses sampled by each server; the trainer computes the logprobs of the
              same tokens: mean KL (exp(d) - d - 1 for d = trainer - engine), mean and largest |d|

The parts run in this order. Each line of results is printed and appended to OUT/results.jsonl as it
comes; the table at the end is OUT/table.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import bench_fp8_trainer
import numpy as np
from bench_control import Control, environment, num_bytes, of_rank
from bench_models import make_model, shape_of
from bench_parts import CPU_ENGINE, GPU_ENGINE, make_parser, make_run_folder, memory_of

from megatron_async_rl import processes
from megatron_async_rl.addresses import free_port
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.weight_sync.broadcast import BroadcastPublisher
from megatron_async_rl.controller.weight_sync.session import UpdateSession
from megatron_async_rl.controller.weight_sync.snapshot import SnapshotStore, TrainerPublisher
from megatron_async_rl.errors import Error
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.protocol.messages import Shutdown
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.engine_process import SGLangServer
from megatron_async_rl.rollout.worker import RolloutWorker
from megatron_async_rl.rollout.workflows.single_turn import SingleTurn

FORMATS: dict[str, dict[str, str]] = {"bf16": {}, "fp8": {"quantization": "fp8_block"}}
PARTS = ("update", "decode", "mismatch")
PROMPT_TOKENS = 64
TIMEOUT_S = 120.0
# whole blocks of 128 x 128
TINY = {"hidden_size": 128, "intermediate_size": 384, "num_key_value_heads": 4}
MODELS = ("0.6b", "1.7b", "8b", "30b-a3b", "tiny")


@dataclass
class Member:
    """A server with its worker, and the publisher of its format."""

    config: Config
    server: SGLangServer
    worker: RolloutWorker
    publisher: TrainerPublisher | BroadcastPublisher


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--layers", type=int, help="layers to keep of the model; default: all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--transport", choices=["network", "disk"], default="network")
    parser.add_argument("--gpus", default="0,1", help="GPU of the trainer, GPU of the servers")
    parser.add_argument("--updates", type=int, default=4, help="per format, after the first")
    parser.add_argument("--loads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of each load and format")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--fp8-gemm", default="triton", help="sglang.fp8_gemm_backend; or auto")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--role", choices=["trainer"], help="internal")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    if arguments.role:
        bench_fp8_trainer.run(arguments.out)
        return
    if arguments.cpu:
        arguments.loads, arguments.new_tokens, arguments.samples = [2, 4], 16, 8
    asyncio.run(Bench(arguments).run())


def make_config(arguments: argparse.Namespace, model: Path, name: str) -> Config:
    """Returns the configuration of one format; both have the same weights (run.seed)."""
    samples = max(*arguments.loads, arguments.samples)
    tokens = PROMPT_TOKENS + arguments.new_tokens
    engine: dict[str, Any] = CPU_ENGINE
    if not arguments.cpu:
        engine = GPU_ENGINE | {
            "mem_fraction_static": 0.85,
            "max_total_tokens": samples * (tokens + 16),  # a part of the memory for each server
            "disable_radix_cache": True,
            "disable_prefill_cuda_graph": True,  # prefill is not measured
        }
        if name == "fp8":
            engine = engine | {"fp8_gemm_backend": arguments.fp8_gemm}
    return configuration.from_tree(
        {
            "run": {"dir": str(arguments.out), "steps": 1},
            "model": {"path": str(model), "context_tokens": tokens, "random_init": True},
            "data": {"train": "none"},
            "rollout": {
                "max_new_tokens": arguments.new_tokens,
                "max_concurrent_samples": samples,
                "request_timeout_s": TIMEOUT_S,
            },
            "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
            "trainer": {
                "precision": "fp32" if arguments.cpu else "bf16",
                "max_tokens_per_microbatch": max(tokens, 8192),
            },
            "weights": {
                "update_timeout_s": TIMEOUT_S,
                "transport": arguments.transport,
                "verify_every": 1,
            }
            | FORMATS[name],
            "sglang": engine | {"load_format": "dummy"},
        }
    )


class Bench:
    """The controller's place: two servers in this process, one trainer rank in another."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._out: Path = arguments.out
        self._rows: list[dict[str, Any]] = []
        self._members: dict[str, Member] = {}
        self._workers: list[asyncio.Task[None]] = []
        self._version = 0

    async def run(self) -> None:
        make_run_folder(self._out)
        sizes = shape_of(self._arguments.model, self._arguments.layers)
        if self._arguments.model == "tiny":
            sizes |= TINY
        model = make_model(self._out / "model", sizes)
        self._vocab_size = sizes["vocab_size"]
        configs = {name: make_config(self._arguments, model, name) for name in FORMATS}
        for name, config in configs.items():
            (self._out / f"{name}.yaml").write_text(configuration.dump(config))
        self._control = Control(self._out)
        receiving = asyncio.create_task(self._control.receive())
        trainer = self._start_trainer()
        try:
            await _until_one_ends(self._measure(configs), receiving, _ended(trainer))
        finally:
            await self._control.close()
            for task in (receiving, *self._workers):
                task.cancel()
            await asyncio.gather(*self._workers, return_exceptions=True)
            for member in self._members.values():
                await member.server.stop()
            processes.stop([trainer], 10.0)
        text = table(self._rows)
        (self._out / "table.md").write_text(text)
        print(text)

    async def _measure(self, configs: dict[str, Config]) -> None:
        a = self._arguments
        for name, config in configs.items():
            await self._start_server(name, config)
        for _ in range(1 + (a.updates if "update" in a.parts else 0)):
            for name in FORMATS:
                await self._update(name)
        if "decode" in a.parts:
            for load in a.loads:
                for number in range(-1, a.rounds):  # the first warms up
                    for name in FORMATS:
                        await self._decode(name, load, is_warm_up=number < 0)
        if "mismatch" in a.parts:
            await self._mismatch()

    async def _start_server(self, name: str, config: Config) -> None:
        """One after the other: SGLang takes its part of the memory that is free at its start."""
        started = time.monotonic()
        if not self._arguments.cpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = self._arguments.gpus.split(",")[-1]
        os.environ["NCCL_NVLS_ENABLE"] = "0"
        os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")  # takes minutes
        server = SGLangServer(config, self._out, name)
        await server.start()
        worker = RolloutWorker(name, config, Link(self._out), server, SingleTurn())
        self._workers.append(asyncio.create_task(worker.run()))
        session = UpdateSession(self._control.send, TIMEOUT_S)
        publisher: TrainerPublisher | BroadcastPublisher = BroadcastPublisher(session, 1, 1)
        if self._arguments.transport == "disk":
            publisher = TrainerPublisher(session, config, SnapshotStore(config))
        publisher.start_epoch(len(self._members))  # update groups with names of their own
        self._members[name] = Member(config, server, worker, publisher)
        memory = await memory_of(server)
        seconds = round(time.monotonic() - started, 1)
        self._report("start", name, seconds=seconds, memory_gib=memory)
        await self._control.wait_for(name, TIMEOUT_S)

    def _start_trainer(self) -> Any:
        command = [sys.executable, __file__, str(self._out), "--role", "trainer"]
        gpu = None if self._arguments.cpu else self._arguments.gpus.split(",")[0]
        variables = environment(gpu) | of_rank(0, 1, free_port())
        return processes.start(command, self._out / "logs" / "trainer.log", variables)

    def _report(self, part: str, name: str, **figures: Any) -> None:
        row = {"part": part, "format": name, "model": self._arguments.model} | figures
        self._rows.append(row)
        print(json.dumps(row), flush=True)
        with (self._out / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    async def _update(self, name: str) -> None:
        """Takes the trainer's next offer, which is of this format."""
        member, is_first = self._members[name], self._version < len(FORMATS)
        outcome, offer = await self._control.publish(member.publisher, self._version, name)
        seconds = {phase: round(value, 4) for phase, value in outcome.seconds.items()}
        figures = {"bytes": num_bytes(offer), "buckets": len(offer.buckets), "seconds": seconds}
        digests_equal = outcome.serving == [name]  # or the server is fenced
        self._version += 1
        if not digests_equal:
            raise Error(f"{name}: {outcome.fenced}")
        if "update" in self._arguments.parts:
            self._report("update", name, first=is_first, digests_equal=digests_equal, **figures)

    async def _generate(self, name: str, count: int, seed: int) -> list[tuple[list[int], Any]]:
        """Returns (prompt, response) of that many requests at once."""
        rng = np.random.default_rng(seed)
        prompts = rng.integers(3, self._vocab_size, (count, PROMPT_TOKENS)).tolist()
        sampling = Sampling(self._arguments.new_tokens, 1.0, [])
        client = self._members[name].server.client
        outputs = await asyncio.gather(*(client.generate(ids, sampling) for ids in prompts))
        return list(zip(prompts, outputs, strict=True))

    async def _decode(self, name: str, load: int, is_warm_up: bool) -> None:
        started = time.monotonic()
        pairs = await self._generate(name, load, seed=load)
        seconds = time.monotonic() - started
        tokens = sum(len(segment.ids) for _, output in pairs for segment in output.segments)
        if not is_warm_up:
            figures = {"seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 1)}
            self._report("decode", name, load=load, tokens=tokens, **figures)

    async def _mismatch(self) -> None:
        """Writes the samples for the trainer, which answers with a file."""
        for name in FORMATS:
            samples = [
                {
                    "ids": prompt + [t for segment in output.segments for t in segment.ids],
                    "logprobs": [x for segment in output.segments for x in segment.logprobs],
                }
                for prompt, output in await self._generate(name, self._arguments.samples, seed=7)
            ]
            bench_fp8_trainer.hand_over(self._out / f"{name}.samples.json", samples)
        await self._control.send("trainer-0", Shutdown("no more updates"))
        for name in FORMATS:
            answer = self._out / f"{name}.mismatch.json"
            while not answer.exists():
                await asyncio.sleep(0.2)
            self._report("mismatch", name, **json.loads(answer.read_text()))


async def _until_one_ends(measuring: Any, *others: Any) -> None:
    tasks = [asyncio.ensure_future(task) for task in (measuring, *others)]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if tasks[0] not in done:
        tasks[0].cancel()
    for task in done:
        task.result()


async def _ended(trainer: Any) -> None:
    """Returns when the trainer has ended well; raises Error if it has not."""
    code = await asyncio.to_thread(trainer.wait)
    if code:
        raise Error("the trainer ended; see logs/trainer.log")
    await asyncio.sleep(TIMEOUT_S)  # its last file is being read


def table(rows: list[dict[str, Any]]) -> str:
    """Returns one line per figure: bf16, fp8 and their ratio, medians over the rounds."""
    figures: dict[str, Callable[[dict[str, Any]], Any]] = {}
    updates = ("total", "pause", "wire", "gather", "load", "digest", "write", "check_files")
    for phase in updates:
        figures[f"update: {phase} s"] = lambda row, phase=phase: (
            row["part"] == "update" and row["seconds"].get(phase)
        )
    figures["update: GB"] = lambda row: row["part"] == "update" and row["bytes"] / 1e9
    for load in sorted({row["load"] for row in rows if row["part"] == "decode"}):
        figures[f"decode: tokens/s of {load} requests"] = lambda row, load=load: (
            row["part"] == "decode" and row["load"] == load and row["tokens_per_s"]
        )
    for key in ("mismatch_kl", "logprob_diff_mean", "logprob_diff_max"):
        figures[f"mismatch: {key}"] = lambda row, key=key: row["part"] == "mismatch" and row[key]
    figures["server: weights GiB"] = lambda row: (
        row["part"] == "start" and row["memory_gib"].get("weight")
    )
    lines = ["| | bf16 | fp8 | fp8 / bf16 |", "|---|---|---|---|"]
    for name, figure in figures.items():
        values = [
            [float(v) for row in rows if row["format"] == kind and not row.get("first")
             if (v := figure(row)) not in (False, None)]
            for kind in FORMATS
        ]  # fmt: skip
        if all(values):
            bf16, fp8 = map(statistics.median, values)
            ratio = f"{fp8 / bf16:.3f}" if bf16 else ""
            lines.append(f"| {name} | {bf16:.5g} | {fp8:.5g} | {ratio} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
