#!/usr/bin/env python3
"""How long a weight update takes: live Megatron shards to a live SGLang server while it generates.

    python tools/bench_publish.py OUT --model 8b --buckets 2147483648 1073741824      # 2 GPUs: trainer TP=1, engine tp=1
    python tools/bench_publish.py OUT --model 8b --trainer-tp 2 --engine-tp 2         # 4 GPUs
    python tools/bench_publish.py OUT --model tiny --device cpu                       # a try on a laptop, gloo

What runs is the product: WeightPublisher in trainer ranks with megatron-core's model (random weights, no optimizer),
Publisher behind a Hub here, a rollout worker process with its SGLang server, and --requests samples leased to it all
the time. Beside it: a plain broadcast of the same bytes in buckets of the same size, from the trainer's first GPU to
the engine's first, before the engine takes its memory. Writes OUT/updates.json and OUT/table.md.

Seconds of an update (Publisher's own): interrupt: the gate for requests closed and all aborted; drain: until the last
of them was answered; load: from there all buckets received and loaded, by the server (it waits for the drain first);
wire: the same seen by the trainer, from the first gather to the last byte sent; gather, trainer_digest: on the trainer's
GPU, inside wire; flush: the prefix cache dropped; digest: the server's checksums and the comparison; pause: from closing
the gate to opening it, in the rollout worker; total: from the controller's first message to its last. Every bucket size
is run twice: with the server idle, which is where the rate of the wire is taken, and with its --requests running.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402

from megatron_async_rl import config as configuration  # noqa: E402
from megatron_async_rl import processes  # noqa: E402
from megatron_async_rl.config import Config  # noqa: E402
from megatron_async_rl.controller.publisher import Outcome, Publisher  # noqa: E402
from megatron_async_rl.errors import Error, PublishError  # noqa: E402
from megatron_async_rl.messages import (  # noqa: E402
    BucketsSent,
    Failed,
    Generate,
    Generated,
    GenerateFailed,
    GroupJoined,
    GroupOpened,
    Heartbeat,
    Hello,
    Message,
    PublishOffer,
    ReceiveBuckets,
    Shutdown,
    Updated,
    UpdateReady,
    Welcome,
)
from megatron_async_rl.transport import Hub, Peer, SyncLink, free_port  # noqa: E402
from megatron_async_rl.types import Prompt  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Qwen3-8B's sizes
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 320,
    },
}
PHASES = ("interrupt", "drain", "gather", "trainer_digest", "wire", "load", "flush", "digest", "pause", "total")
PROMPT_TOKENS = 64
UPDATE_TIMEOUT_S = 20.0
CPU_ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.1,
    "max_total_tokens": 65536,
    "disable_overlap_schedule": True,
}
GPU_ENGINE = {
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.7,
}


def make_model(folder: Path, name: str) -> Path:
    """config.json and a tokenizer that knows three tokens: all that random weights need."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config | SHAPES[name]))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    vocabulary = {"<end>": 0, "<pad>": 1, "<unk>": 2}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return folder


def make_config(arguments: argparse.Namespace, model: Path, run_dir: Path) -> Config:
    on_cpu = arguments.device == "cpu"
    engine = dict(CPU_ENGINE if on_cpu else GPU_ENGINE)
    return configuration.from_tree(
        {
            "run": {"dir": str(run_dir), "steps": 1},
            "model": {"path": str(model), "context_tokens": PROMPT_TOKENS + arguments.new_tokens, "random_init": True},
            "data": {"train": "none"},
            "rollout": {
                "max_new_tokens": arguments.new_tokens,
                "max_concurrent_samples": arguments.requests,
                "request_timeout_s": 60.0,
            },
            "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
            "trainer": {"precision": "fp32" if on_cpu else "bf16"},
            "weights": {"update_timeout_s": UPDATE_TIMEOUT_S},
            "megatron": {"tensor_model_parallel_size": arguments.trainer_tp},
            "sglang": engine | {"tp_size": arguments.engine_tp, "load_format": "dummy"},
        }
    )


# ---- the trainer's ranks


def way(text: str) -> tuple[int, str]:
    """weights.bucket_bytes and weights.wire."""
    size, _, wire = text.partition(":")
    return int(size), wire or "bucket"


def trainer(run_dir: Path, buckets: list[str], updates: int, kill: bool) -> None:
    """One rank: publishes `updates` versions with each bucket size."""
    from megatron_async_rl import patches

    patches.prepare_megatron()
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    from megatron_async_rl.trainer import model, parallel
    from megatron_async_rl.weights.publish import WeightPublisher

    settings = configuration.load(run_dir / "config.yaml")
    parallel.init_parallel(settings)
    _, shape, modules = model.build_modules(settings)
    socket = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        socket = SyncLink(run_dir)
        socket.join(Hello("trainer", f"trainer-{dist.get_rank()}", os.getpid(), stage=0))
    version = 0
    for size, wire in 2 * list(map(way, buckets)):  # once idle, once busy
        weights = msgspec.structs.replace(settings.weights, bucket_bytes=size, wire=wire)
        publisher = WeightPublisher(modules, shape, msgspec.structs.replace(settings, weights=weights), socket)
        for _ in range(updates):
            publisher.publish(version)
            version += 1
    if kill:
        publisher.publish(version)
        publisher.publish(version + 1)


# ---- a plain broadcast, to hold the figures against


def baseline(rank: int, port: int, device: str, buckets: list[int], total_bytes: int) -> None:
    """Two processes: `total_bytes` in flat buffers that are ready, one after the other. Prints the best of five."""
    import torch
    import torch.distributed as dist

    backend, place = ("nccl", "cuda") if device == "cuda" else ("gloo", "cpu")
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for size in buckets:
        buffers = [torch.ones(min(size, total_bytes), dtype=torch.uint8, device=place) for _ in range(2)]
        best = float("inf")
        for attempt in range(6):
            dist.barrier()
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.monotonic()
            left, number = total_bytes, 0
            while left > 0:
                dist.broadcast(buffers[number % 2][: min(size, left)], src=0)
                left, number = left - size, number + 1
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.monotonic() - started) if attempt else best
        if rank == 0:
            print(json.dumps({"bucket_bytes": size, "seconds": best}), flush=True)
        del buffers
    dist.destroy_process_group()


# ---- the controller's side


class Bench:
    """Welcomes trainer and rollout worker, keeps the worker busy, publishes when told."""

    def __init__(self, hub: Hub, arguments: argparse.Namespace, rollout_pid: int) -> None:
        self._hub = hub
        self.rollout_pid = rollout_pid
        self._arguments = arguments
        self._peers: dict[str, Peer] = {}
        self._offers: asyncio.Queue[tuple[str, PublishOffer]] = asyncio.Queue()
        self._next_group = 0
        self._rng = np.random.default_rng(0)
        self.publisher = Publisher(self._send, arguments.engine_tp, UPDATE_TIMEOUT_S, verify_every=2)
        self.num_failed = self.num_generated = self.num_running = 0
        self._server_to_kill: psutil.Process | None = None

    async def _send(self, name: str, message: Message) -> None:
        await self._hub.send(self._peers[name], message)
        if isinstance(message, ReceiveBuckets) and self._server_to_kill is not None:
            await asyncio.sleep(0.01)
            for process in self._server_to_kill.children(recursive=True):
                process.kill()

    async def receive(self) -> None:
        while True:
            peer, message = await self._hub.receive()
            name = next((n for n, p in self._peers.items() if p == peer), "")
            if isinstance(message, Hello):
                self._peers[message.name] = peer
                await self._hub.send(peer, Welcome(0))
                print(f"{message.name} joined", flush=True)
            elif isinstance(message, PublishOffer):
                self._offers.put_nowait((name, message))
            elif isinstance(message, Generated):
                self.num_generated += message.sample.num_generated
                await self.lease()
            elif isinstance(message, GenerateFailed):
                self.num_failed += 1
                print(f"a sample failed: {message.error}", flush=True)
                await self.lease()
            elif isinstance(message, UpdateReady | GroupOpened | GroupJoined | BucketsSent | Updated):
                self.publisher.inbox.put_nowait((name, message))
            elif isinstance(message, Failed):
                if self._server_to_kill is None:
                    raise Error(f"{name}: {message.error}")
            elif isinstance(message, Heartbeat):
                self.num_running = message.running

    async def lease(self) -> None:
        ids = self._rng.integers(3, SHAPES[self._arguments.model]["vocab_size"], PROMPT_TOKENS).astype(np.int32)
        self._next_group += 1
        prompt = Prompt(str(self._next_group), ids, {})
        lease = Generate(0, self._next_group, 0, [0], "train", prompt, self._arguments.new_tokens, 1.0)
        await self._send("rollout-0", lease)

    async def publish(self, version: int) -> tuple[Outcome, PublishOffer]:
        name, offer = await asyncio.wait_for(self._offers.get(), 300)
        outcome = await self.publisher.publish(version, {name: offer}, ["rollout-0"], lambda name: None)
        return outcome, offer

    async def run(self) -> list[dict[str, Any]]:
        while "rollout-0" not in self._peers:  # noqa: ASYNC110 (its server starts; `until_one_fails` ends the wait if it does not)
            await asyncio.sleep(0.2)
        rows: list[dict[str, Any]] = []
        version = 0
        ways = list(map(way, self._arguments.buckets))
        for busy, (size, wire) in [*((False, w) for w in ways), *((True, w) for w in ways)]:
            if busy and not self._next_group:
                for _ in range(self._arguments.requests):
                    await self.lease()
                await asyncio.sleep(self._arguments.gap_s)
            self.publisher.forget_groups()
            for number in range(self._arguments.updates):
                outcome, offer = await self.publish(version)
                total_bytes = sum(spec_bytes(t.dtype, t.shape) for b in offer.buckets for t in b.tensors)
                row = {
                    "version": version,
                    "bucket_bytes": size,
                    "wire": wire,
                    "busy": busy,
                    "buckets": len(offer.buckets),
                    "bytes": total_bytes,
                    "first": number == 0,
                    "verified": "trainer_digest" in outcome.seconds,
                    "interrupted": outcome.num_interrupted,
                    "peak_bytes": outcome.peak_bytes,
                    "fenced": outcome.fenced,
                    "seconds": outcome.seconds,
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
                (self._arguments.out / "updates.json").write_text(json.dumps(rows, indent=1))
                version += 1
                await asyncio.sleep(self._arguments.gap_s if busy else 0.2)
        if self._arguments.kill:
            await self._kill_in_the_middle(version)
        for name in self._peers:
            await self._send(name, Shutdown("the benchmark is over"))
        return rows

    async def _kill_in_the_middle(self, version: int) -> None:
        """The server dies while buckets are on their way: the update must fail in time, and the trainer offer the next."""
        self._server_to_kill = psutil.Process(self.rollout_pid)
        started = time.monotonic()
        try:
            await self.publish(version)
            print("the server was killed, and yet the update succeeded", flush=True)
        except PublishError as e:
            print(f"killed in the middle: the update failed after {time.monotonic() - started:.1f} s: {e}", flush=True)
        _, offer = await asyncio.wait_for(self._offers.get(), 60)
        print(f"the trainer is alive and offers version {offer.version}", flush=True)


def spec_bytes(dtype: str, shape: list[int]) -> int:
    return int(np.prod(shape)) * (4 if dtype == "float32" else 2)


def table(rows: list[dict[str, Any]], plain: dict[int, float]) -> str:
    """One line per bucket size and kind of update: medians after the first, in milliseconds."""
    columns = ["bucket GB", "wire", "interrupted", "digests", "updates", *(f"{phase} ms" for phase in PHASES)]
    columns += ["GB/s", "plain GB/s", "share", "peak GB", "worst pause ms"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    kinds = ("bucket_bytes", "wire", "busy", "verified")
    for size, wire, busy, verified in sorted({tuple(row[kind] for kind in kinds) for row in rows}):
        chosen = [
            row
            for row in rows
            if tuple(row[kind] for kind in kinds) == (size, wire, busy, verified) and not row["first"]
        ]
        if not chosen:
            continue
        seconds = {phase: statistics.median(r["seconds"].get(phase, 0.0) for r in chosen) for phase in PHASES}
        rate = chosen[0]["bytes"] / seconds["wire"] / 1e9
        plain_rate = chosen[0]["bytes"] / plain[size] / 1e9 if size in plain else float("nan")
        cells = [f"{size / 1e9:.2f}", wire, str(statistics.median(r["interrupted"] for r in chosen))]
        cells += ["yes" if verified else "no", str(len(chosen))]
        cells += [f"{1000 * seconds[phase]:.1f}" for phase in PHASES]
        cells += ["", "", ""] if busy else [f"{rate:.1f}", f"{plain_rate:.1f}", f"{rate / plain_rate:.2f}"]
        cells += [f"{max(r['peak_bytes'] for r in chosen) / 1e9:.2f}"]
        cells += [f"{1000 * max(r['seconds']['pause'] for r in chosen):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--trainer-tp", type=int, default=1)
    parser.add_argument("--engine-tp", type=int, default=1)
    parser.add_argument("--buckets", nargs="+", default=["2147483648"], help="bytes, or bytes:tensor for weights.wire")
    parser.add_argument("--updates", type=int, default=7, help="per bucket size; every second one verifies digests")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=4096)
    parser.add_argument("--gap-s", type=float, default=6.0, help="seconds of generation between updates")
    parser.add_argument("--kill", action="store_true", help="at the end kill the server in the middle of an update")
    parser.add_argument("--role", choices=["trainer", "baseline"], help="for the processes that this starts")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--total-bytes", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.role == "trainer":
        trainer(arguments.out, arguments.buckets, arguments.updates, arguments.kill)
    elif arguments.role == "baseline":
        baseline(
            arguments.rank,
            arguments.port,
            arguments.device,
            sorted({way(text)[0] for text in arguments.buckets}),
            arguments.total_bytes,
        )
    else:
        asyncio.run(benchmark(arguments))


def model_bytes(arguments: argparse.Namespace) -> int:
    s = SHAPES[arguments.model]
    heads = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    layer = s["hidden_size"] * (2 * heads[0] + 2 * heads[1] + 3 * s["intermediate_size"] + 2) + 2 * s["head_dim"]
    weights = 2 * s["vocab_size"] * s["hidden_size"] + s["num_hidden_layers"] * layer + s["hidden_size"]
    return weights * (4 if arguments.device == "cpu" else 2)


def start(arguments: argparse.Namespace, name: str, command: list[str], gpus: range, **extra: str) -> Any:
    environment = {
        "NCCL_CUMEM_ENABLE": "0",
        "NCCL_NVLS_ENABLE": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
    } | extra
    if arguments.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return processes.start(command, arguments.out / "logs" / f"{name}.log", environment)


async def benchmark(arguments: argparse.Namespace) -> None:
    out = arguments.out
    (out / "logs").mkdir(parents=True)
    (out / "keys").mkdir(mode=0o700)
    config = make_config(arguments, make_model(out / "model", arguments.model), out)
    (out / "config.yaml").write_text(configuration.dump(config))
    trainer_gpus = range(arguments.trainer_tp)
    engine_gpus = range(arguments.trainer_tp, arguments.trainer_tp + arguments.engine_tp)
    hub = Hub(out)
    children: list[subprocess.Popen[bytes]] = []
    me, common = [sys.executable, __file__], ["--buckets", *map(str, arguments.buckets)]
    try:
        rollout = [sys.executable, "-m", "megatron_async_rl.rollout", str(out), "rollout-0"]
        children.append(start(arguments, "rollout-0", rollout, engine_gpus))
        plain = await measure_plain(arguments, [*me, str(out), *common], trainer_gpus, engine_gpus)
        port = str(free_port())
        for rank in trainer_gpus:
            command = [*me, str(out), *common, "--role", "trainer", "--updates", str(arguments.updates)]
            command += ["--kill"] if arguments.kill else []
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.trainer_tp)}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            children.append(start(arguments, f"trainer-{rank}", command, trainer_gpus, **ranks, **meeting))
        bench = Bench(hub, arguments, children[0].pid)
        loops = [asyncio.create_task(loop()) for loop in (bench.run, bench.receive)]
        loops.append(asyncio.create_task(until_one_fails(children[1:] if arguments.kill else children)))
        done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
        for task in loops[1:]:
            task.cancel()
        rows = next(iter(done)).result()
        text = table(rows, plain)
        (out / "table.md").write_text(text)
        print(text, f"samples failed: {bench.num_failed}, tokens generated: {bench.num_generated}", sep="")
    finally:
        processes.stop(children, 10.0)
        hub.close()


async def measure_plain(
    arguments: argparse.Namespace, command: list[str], trainer_gpus: range, engine_gpus: range
) -> dict[int, float]:
    """Seconds by bucket size."""
    more = ["--role", "baseline", "--device", arguments.device, "--total-bytes", str(model_bytes(arguments))]
    more += ["--port", str(free_port())]
    pair = [
        start(arguments, f"baseline-{rank}", [*command, *more, "--rank", str(rank)], gpus[:1])
        for rank, gpus in enumerate((trainer_gpus, engine_gpus))
    ]
    try:
        deadline = time.monotonic() + 150
        while any(child.poll() is None for child in pair) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    finally:
        processes.stop(pair, 3.0)
    lines = (arguments.out / "logs" / "baseline-0.log").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"bucket_bytes"')]
    print("plain broadcast:", found, flush=True)
    return {row["bucket_bytes"]: row["seconds"] for row in found}


async def until_one_fails(children: list[subprocess.Popen[bytes]]) -> None:
    while not any(child.poll() for child in children):  # noqa: ASYNC110
        await asyncio.sleep(0.5)
    raise Error("a process of the benchmark ended; see logs/ in its folder")


if __name__ == "__main__":
    main()
