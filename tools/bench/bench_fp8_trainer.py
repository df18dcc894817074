"""The trainer rank of tools/bench/bench_fp8_rollout.py: publishes in turn, compares logprobs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_async_rl.config import load as configuration
from megatron_async_rl.protocol.messages import Hello
from megatron_async_rl.protocol.sync_link import SyncLink
from megatron_async_rl.protocol.types import TrainSample

WAIT_S = 5.0


def run(out: Path) -> None:
    """Publishes as bf16 and fp8 in turn until stopped; then answers each file of samples."""
    from megatron_async_rl import patches

    patches.prepare_megatron()
    from megatron_async_rl.trainer import parallel
    from megatron_async_rl.trainer.model import build
    from megatron_async_rl.weights.publish import WeightPublisher

    configs = {name: configuration.load(out / f"{name}.yaml") for name in ("bf16", "fp8")}
    parallel.init_parallel(configs["bf16"])
    transformer, shape, modules = build.build_modules(configs["bf16"])
    chunks = modules
    if transformer.bf16:
        chunks = [build._in_half_precision(transformer, module) for module in modules]
    link = SyncLink(out)
    link.join(Hello("trainer", "trainer-0", os.getpid(), stage=0))
    publishers = [WeightPublisher(modules, shape, config, link) for config in configs.values()]
    version = 0
    while publishers[version % 2].publish(version):
        version += 1
    device = parallel.device()
    model: Any = build.TrainerModel(transformer, shape, modules, chunks, None, None, device)  # type: ignore[arg-type]
    for name, config in configs.items():
        if (path := out / f"{name}.samples.json").exists():
            hand_over(out / f"{name}.mismatch.json", mismatch(model, config, read(path)))
    time.sleep(WAIT_S)


def mismatch(model: Any, config: Any, samples: list[dict[str, list[Any]]]) -> dict[str, float]:
    """Returns the means and the maximum over all sampled tokens; see bench_fp8_rollout.py."""
    from megatron_async_rl.trainer import passes
    from megatron_async_rl.trainer.data.microbatch import Packing, pack

    packing, differences, engine = Packing.of(model, config), [], []
    for sample in samples:
        ids = np.asarray(sample["ids"], np.int32)
        zeros = np.zeros(len(ids), np.float32)
        one = TrainSample(ids, zeros, np.zeros(len(ids), np.int32), zeros)
        [logprobs] = passes.current_logprobs(model, [[pack([one], 0, packing)]], config)
        count = len(sample["logprobs"])
        own = logprobs[len(ids) - 1 - count : len(ids) - 1].float().cpu().numpy()
        engine.append(np.asarray(sample["logprobs"]))
        differences.append(own.astype(np.float64) - engine[-1])
    d = np.concatenate(differences)
    return {
        "tokens": len(d),
        "mismatch_kl": float((np.exp(d) - d - 1).mean()),
        "logprob_diff_mean": float(np.abs(d).mean()),
        "logprob_diff_max": float(np.abs(d).max()),
        "engine_logprob_mean": float(np.concatenate(engine).mean()),
    }


def hand_over(path: Path, value: Any) -> None:
    """Writes a file that another process waits for."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.rename(path)


def read(path: Path) -> Any:
    return json.loads(path.read_text())
