"""Measures samples per second through one controller, from rollout to trainer, on one core.

    python tools/bench/bench_controller.py [--seconds 10] [--tokens 32768] [--clients 2] [--profile]

The controller is the product's, complete: CURVE on every socket, journal, sample log, TensorBoard,
the handshake of weight updates, checkpoints that shorten the journal. A sample has 32,768 tokens
with logprobs and versions: 393,216 bytes in and, with advantages, 524,288 bytes out to the trainer.
Its peers are processes on the other cores that speak the real messages: rollout clients answer
every lease at once, a scorer every request, a trainer every batch. Versions and advantages are
equal for all tokens of a sample and are sent as runs (protocol/wire.py): 262 KB each way.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import logging
import multiprocessing
import os
import pstats
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from megatron_async_rl import processes
from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, Journal
from megatron_async_rl.data.tokenizer import fingerprint
from megatron_async_rl.observability import run_log
from megatron_async_rl.protocol.hub import Hub
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.protocol.messages import (
    CheckpointSaved,
    Generate,
    Generated,
    GetBatch,
    Hello,
    ScoreRequest,
    ScoreResult,
    Shutdown,
    StepDone,
    TrainBatch,
)
from megatron_async_rl.protocol.types import NOT_GENERATED, Sample
from megatron_async_rl.protocol.weight_messages import (
    Bucket,
    BucketsSent,
    GroupJoined,
    GroupOpened,
    JoinGroup,
    OpenGroup,
    Published,
    PublishOffer,
    SendBuckets,
    TensorSpec,
    Updated,
    UpdateReady,
    UpdateWeights,
    WeightDigests,
)
from megatron_async_rl.storage import checkpoints

GROUPS_PER_STEP, SAMPLES = 16, 8
NUM_PROMPT = 1
VOCABULARY = 150_000
CHECKPOINT_EVERY = 4  # steps; the journal forgets events older than two checkpoints
WARM_UP_STEPS = 8
BUCKETS = [Bucket([TensorSpec("w", "bfloat16", [1])])]
STATS = {
    "train/loss": 0.0,
    "train/tokens": 1.0,
    "perf/time/proximal_s": 0.0,
    "perf/time/train_s": 1.0,
}


def make_config(folder: Path, tokens: int, clients: int) -> Config:
    """Writes a model folder with a tokenizer of one word and a dataset; returns their config."""
    model = folder / "model"
    model.mkdir()
    Tokenizer(models.WordLevel({"1": 0, "<|end|>": 1}, unk_token="1")).save(
        str(model / "tokenizer.json")
    )
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (model / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    rows = ({"id": str(n), "prompt": "1", "answer": "1"} for n in range(1000))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load.from_tree(
        {
            "run": {"dir": str(folder / "run"), "steps": 10**6},
            "model": {"path": str(model), "context_tokens": tokens + 8},
            "trainer": {"max_tokens_per_microbatch": tokens + 8},
            "data": {"train": str(folder / "train.jsonl")},
            "rollout": {"max_new_tokens": tokens, "servers": clients, "max_concurrent_samples": 64},
            "reward": {"workers": 1},
            "algorithm": {"prompts_per_step": GROUPS_PER_STEP, "samples_per_prompt": SAMPLES},
            "staleness": {"max_staleness": 2},
        }
    )


# ---- peers of the controller


def rollout(run_dir: Path, number: int, tokens: int, tokenizer: str) -> None:
    versions = np.full(tokens, NOT_GENERATED, np.int32)
    draw = np.random.default_rng(number)
    ids = draw.integers(0, VOCABULARY, tokens, dtype=np.int32)
    logprobs = -draw.exponential(size=tokens).astype(np.float32)

    async def body() -> None:
        link = Link(run_dir)
        await link.join(
            Hello("rollout", f"rollout-{number}", os.getpid(), capacity=64, tokenizer=tokenizer)
        )
        while not isinstance(message := await link.receive(), Shutdown):
            if isinstance(message, Generate):
                ids[:NUM_PROMPT] = message.prompt.ids
                versions[NUM_PROMPT:] = message.floor_version
                for index in message.indices:
                    sample = Sample(
                        ids=ids, logprobs=logprobs, versions=versions, stop="stop", text="1"
                    )
                    await link.send(Generated(message.key(index), sample))
            elif isinstance(message, UpdateWeights):
                await link.send(UpdateReady(message.version, {}))
            elif isinstance(message, JoinGroup):
                await link.send(GroupJoined(message.group))
            elif isinstance(message, WeightDigests):
                await link.send(Updated(message.version, {}))
        link.close()

    asyncio.run(body())


def scorer(run_dir: Path) -> None:
    async def body() -> None:
        link = Link(run_dir)
        await link.join(Hello("reward", "reward-0", os.getpid(), capacity=256))
        while not isinstance(message := await link.receive(), Shutdown):
            if isinstance(message, ScoreRequest):
                reward = float(message.key.index % 2)
                await link.send(ScoreResult(message.key, reward))
        link.close()

    asyncio.run(body())


def trainer(run_dir: Path, tokenizer: str) -> None:
    async def body() -> None:
        link = Link(run_dir)
        await link.join(
            Hello("trainer", "trainer-0", os.getpid(), leader=0, stage=0, tokenizer=tokenizer)
        )
        await link.send(PublishOffer(0, 0, 1, BUCKETS, "gloo"))
        while not isinstance(message := await link.receive(), Shutdown):
            if isinstance(message, OpenGroup):
                await link.send(GroupOpened(message.group, 0, "127.0.0.1", 1))
                await link.send(GroupJoined(message.group))
            elif isinstance(message, SendBuckets):
                await link.send(BucketsSent(message.version, 0, {"w": "digest"}, {}))
            elif isinstance(message, Published):
                await link.send(GetBatch(message.version))
            elif isinstance(message, TrainBatch):
                version = message.version + 1
                assert len(message.samples) == GROUPS_PER_STEP * SAMPLES
                await link.send(StepDone(version, STATS))
                if version % CHECKPOINT_EVERY == 0:
                    await link.send(CheckpointSaved(version, save_checkpoint(run_dir, version)))
                await link.send(PublishOffer(version, 0, 1, BUCKETS, "gloo"))
        link.close()

    asyncio.run(body())


def save_checkpoint(run_dir: Path, version: int) -> str:
    """Writes a checkpoint of one small file; returns its folder's name."""
    folder = run_dir / checkpoints.FOLDER / checkpoints.folder_name(version)
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"w")
    checkpoints.write_digests(folder, 0, ["weights"])
    return folder.name


def child(core: int, body: object, *values: object) -> None:
    processes.die_with_parent()
    os.sched_setaffinity(0, {core})
    body(*values)  # type: ignore[operator]


# ---- the controller


def cpu_seconds() -> dict[str, float]:
    """Returns the CPU seconds of this process by thread."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    used: dict[str, float] = {}
    for task in Path("/proc/self/task").iterdir():
        command, fields = (task / "stat").read_text().rsplit(") ", 1)
        name = names.get(int(task.name), command.split("(", 1)[1])
        ticks = sum(map(int, fields.split()[11:13]))
        used[name] = used.get(name, 0.0) + ticks / os.sysconf("SC_CLK_TCK")
    return used


async def measure(
    chosen: Config, seconds: float, profile: cProfile.Profile | None
) -> tuple[int, float, dict[str, float]]:
    """Returns (samples, seconds, CPU seconds by thread) between two steps after the warm-up."""
    journal, log = Journal(chosen.run_dir / JOURNAL_FILE), run_log.RunLog(chosen.run_dir, chosen)
    hub = Hub(chosen.run_dir)
    controller = Controller(chosen, hub, log, journal)
    running = asyncio.create_task(controller.run())

    async def step_after(version: int) -> int:
        while controller.core.version <= version:
            if running.done():
                running.result()
            await asyncio.sleep(0.02)
        return controller.core.version

    try:
        first = await step_after(WARM_UP_STEPS)
        began, cpu = time.monotonic(), cpu_seconds()
        if profile:
            profile.enable()
        await asyncio.sleep(seconds)
        last = await step_after(controller.core.version)
        if profile:
            profile.disable()
        wall_s, after = time.monotonic() - began, cpu_seconds()
        await journal.durable()
        return (
            (last - first) * GROUPS_PER_STEP * SAMPLES,
            wall_s,
            {n: after[n] - cpu.get(n, 0.0) for n in after},
        )
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        hub.close()
        journal.close()
        log.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument(
        "--profile", action="store_true", help="print a profile of the event loop's thread"
    )
    parser.add_argument(
        "--dir",
        default=None,
        help="parent of the run folder; default: the system's temporary folder",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    own, *others = sorted(os.sched_getaffinity(0))
    others = others or [own]
    spawn = multiprocessing.get_context("spawn")
    profile = cProfile.Profile(time.thread_time) if arguments.profile else None
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        chosen = make_config(Path(name), arguments.tokens, arguments.clients)
        run_dir, tokenizer = chosen.run_dir, fingerprint(chosen.model.path)
        run_dir.mkdir()
        bodies = [(trainer, run_dir, tokenizer), (scorer, run_dir)]
        bodies += [
            (rollout, run_dir, n, arguments.tokens, tokenizer) for n in range(arguments.clients)
        ]
        children = [
            spawn.Process(target=child, args=(others[n % len(others)], *body))
            for n, body in enumerate(bodies)
        ]
        for process in children:
            process.start()
        os.sched_setaffinity(
            0, {own}
        )  # for all threads started from here on: of zmq and of the journal
        count, wall_s, cpu = asyncio.run(measure(chosen, arguments.seconds, profile))
        for process in children:
            process.join(10)
    if profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    size, total = arguments.tokens * 12, sum(cpu.values())
    parts = ", ".join(
        f"{name} {1e3 * used / count:.2f}" for name, used in cpu.items() if used / total > 0.01
    )
    print(
        f"{count / wall_s:.0f} samples/s of {size:,} bytes, {count} in {wall_s:.1f} s; "
        f"{1e3 * total / count:.2f} ms of CPU each ({parts}): "
        f"{count / total:.0f} per second of one core"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
