"""Arguments, model and configuration of the benchmarks with one server, and rounds of updates."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.rollout.engine_process import SGLangServer

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # the sizes of Qwen3-8B
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
PROMPT_TOKENS = 64
UPDATE_TIMEOUT_S = 20.0
IDLE_GAP_S = 0.2
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


@dataclass(frozen=True)
class Round:
    """Updates of one kind; trainer, rollout worker and controller run the same rounds."""

    busy: bool  # with requests in flight
    bucket_bytes: int
    wire: str
    interrupt: str
    gap_s: float  # between updates


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that `make_config` reads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=sorted(SHAPES), default="8b")
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


def make_model(folder: Path, sizes: dict[str, Any]) -> Path:
    """Writes config.json and a tokenizer of three tokens: all that random weights need."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if sizes.get("num_experts") else "qwen3",
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
    (folder / "config.json").write_text(json.dumps(config | sizes))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    vocabulary = {"<end>": 0, "<pad>": 1, "<unk>": 2}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return folder


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


async def memory_of(server: SGLangServer) -> dict[str, Any]:
    """Returns what the server reports of its GPU's memory: GiB, and tokens of its KV cache."""
    info = await server.client._call("GET", "/server_info", None, server.client._api)
    return info["internal_states"][0].get("memory_usage", {})


def model_bytes(arguments: argparse.Namespace) -> int:
    s = SHAPES[arguments.model]
    heads = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    layer = (
        s["hidden_size"] * (2 * heads[0] + 2 * heads[1] + 3 * s["intermediate_size"] + 2)
        + 2 * s["head_dim"]
    )
    weights = (
        2 * s["vocab_size"] * s["hidden_size"] + s["num_hidden_layers"] * layer + s["hidden_size"]
    )
    return weights * (4 if arguments.device == "cpu" else 2)
