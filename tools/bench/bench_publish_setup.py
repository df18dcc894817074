"""Arguments and configuration of the benchmarks with one server, and rounds of updates."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import yaml
from bench_models import SHAPES
from bench_parts import CPU_ENGINE, GPU_ENGINE, make_parser

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config

PROMPT_TOKENS = 64
UPDATE_TIMEOUT_S = 20.0
IDLE_GAP_S = 0.2


@dataclass(frozen=True)
class Round:
    """Updates of one kind; trainer, rollout worker and controller run the same rounds."""

    busy: bool  # with requests in flight
    bucket_bytes: int
    wire: str
    interrupt: str
    gap_s: float  # between updates


def server_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that `make_config` reads."""
    parser = make_parser(description)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=list(SHAPES), default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--engine-tp", type=int, default=1)
    parser.add_argument(
        "--sglang", nargs="+", metavar="KEY=VALUE", default=[], help="settings of the server"
    )
    parser.set_defaults(trainer_tp=1, no_radix_cache=False)
    return parser


def rounds(arguments: argparse.Namespace) -> list[Round]:
    """Returns the rounds: idle ones first, which measure the wire alone."""
    idle = [
        Round(False, *parse_bucket(text), arguments.interrupts[0], IDLE_GAP_S)
        for text in arguments.buckets
    ]
    busy = itertools.product(arguments.gap_s, arguments.buckets, arguments.interrupts)
    return idle + [
        Round(True, *parse_bucket(text), interrupt, gap_s) for gap_s, text, interrupt in busy
    ]


def parse_bucket(text: str) -> tuple[int, str]:
    """Returns weights.bucket_bytes and weights.broadcast_unit of `BYTES` or `BYTES:UNIT`."""
    size, _, wire = text.partition(":")
    return int(size), wire or "bucket"


def make_config(arguments: argparse.Namespace, model: Path, run_dir: Path) -> Config:
    on_cpu = arguments.device == "cpu"
    engine = dict(CPU_ENGINE if on_cpu else GPU_ENGINE) | {
        "disable_radix_cache": arguments.no_radix_cache
    }
    if "keep" in arguments.interrupts:
        engine["disable_overlap_schedule"] = True  # the product requires it
    engine |= {
        key: yaml.safe_load(value)
        for key, _, value in (text.partition("=") for text in arguments.sglang)
    }
    return configuration.from_tree(
        {
            "run": {"dir": str(run_dir), "steps": 1},
            "model": {
                "path": str(model),
                "context_tokens": PROMPT_TOKENS + arguments.new_tokens,
                "random_init": True,
            },
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
