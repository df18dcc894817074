"""The scenarios of tools/bench/bench_trainer.py: keys, length mixes, settings."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.protocol.types import NOT_GENERATED, TrainSample

MIXES = {
    "8k": (2048, 8192),
    "32k": (8192, 32768),
    "even32k": (1 << 40, 32768),
    "tiny": (64, 256),
}  # mean, longest
SIGMA = 1.0  # of the log-normal: the median is 0.6 of the mean
DEFAULTS = {
    "model": "8b",
    "layers": "",
    "mix": "32k",
    "tokens": "131072",
    "budget": "32768",
    "recompute": "none",
}
DEFAULTS |= {"cutting": "dynamic", "minibatches": "1", "overlap": "no", "steps": "2", "profile": ""}
DEFAULTS |= {"experts": "grouped"}


def scenario(text: str) -> dict[str, str]:
    given = dict(part.split("=", 1) for part in text.split(","))
    if unknown := given.keys() - DEFAULTS.keys():
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: not a key; known are {', '.join(DEFAULTS)}"
        )
    return DEFAULTS | given


def mean_and_longest(mix: str) -> tuple[int, int]:
    if mix in MIXES:
        return MIXES[mix]
    mean, longest = map(int, mix.split("-"))
    return mean, longest


def samples_of(mix: str, tokens: int, vocab: int) -> list[TrainSample]:
    """Returns samples of random tokens.

    Their behavior logprobs are close to those of a random model: no importance weight is extreme.
    """
    rng = np.random.default_rng(0)
    mean, longest = mean_and_longest(mix)
    samples, total = [], 0
    while total < tokens:
        drawn = rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)
        length = int(np.clip(drawn, 16, min(longest, max(tokens - total, 16))))
        versions = np.where(np.arange(length) < min(512, length // 4), NOT_GENERATED, 0).astype(
            np.int32
        )
        logprobs = (-np.log(vocab) + 0.05 * rng.normal(size=length)).astype(np.float32)
        advantages = np.full(length, rng.choice([-1.0, 1.0]), np.float32)
        samples.append(
            TrainSample(
                rng.integers(0, vocab, length).astype(np.int32), logprobs, versions, advantages
            )
        )
        total += length
    return samples


def make_config(shape: dict[str, Any], s: dict[str, str], folder: Path) -> Config:
    (folder / "config.json").write_text(json.dumps(shape))
    tp = int(os.environ.get("WORLD_SIZE", 1))
    megatron: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "lr": 1e-6,
    }
    if "num_experts" in shape:
        megatron |= {"moe_grouped_gemm": s["experts"] == "grouped"}
        megatron |= {"expert_model_parallel_size": tp, "expert_tensor_parallel_size": 1}
    if s["overlap"] == "yes":
        megatron["tp_comm_overlap"] = True
    if s["recompute"] == "full":
        megatron |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif s["recompute"] != "none":
        megatron |= {"recompute_granularity": "full", "recompute_method": "block"}
        megatron["recompute_num_layers"] = int(s["recompute"])
    budget = int(s["budget"])  # the longest sequence, too
    return configuration.from_tree(
        {
            "run": {"dir": "unused", "steps": 1000},
            "model": {"path": str(folder), "context_tokens": budget, "random_init": True},
            "data": {"train": "unused"},
            "rollout": {"max_new_tokens": budget - 1},
            "algorithm": {
                "prompts_per_step": 64,
                "samples_per_prompt": 8,
                "minibatches": int(s["minibatches"]),
            },
            "trainer": {
                "max_tokens_per_microbatch": budget,
                "precision": "bf16" if torch.cuda.is_available() else "fp32",
            },
            "megatron": megatron,
        }
    )
