#!/usr/bin/env python3
"""Measures the mismatch of engine and trainer with and without routing replay, on a CPU.

    python tools/bench/bench_routing_replay.py OUT [--engine-dtype bfloat16] [--samples 48]

Two tiny Qwen3-MoE models, one with random weights and one trained a little on the text of
tools/make_tiny_model.py, are served by a real SGLang, which samples and returns its experts. The
trainer then computes the same tokens' logprobs, in fp32 and in bf16, once with its own choice of
experts and once with the engine's. Prints one line of JSON for each: the metrics of a training
step, and the share of choices (positions x layers) in which the two differ by an expert or more.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

import numpy as np
import torch
from arithmetic import Habits, draw_problems
from bench_parts import CPU_ENGINE, make_parser, running_server
from make_tiny_model import encode, make_optimizers, make_tokenizer, train_step
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.model.routing import replayed_routing
from megatron_async_rl.protocol.types import TrainSample, join_segments
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.samples.routing import CallExperts
from megatron_async_rl.trainer import parallel, step
from megatron_async_rl.trainer.data.microbatch import Packing, pack
from megatron_async_rl.trainer.model import build

LAYERS, EXPERTS, NEW_TOKENS = 4, 16, 48
ROUTER_SCALE = 0.02


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--top-k", type=int, default=2, help="experts per token, of 16")
    parser.add_argument("--train-steps", type=int, default=120)
    arguments = parser.parse_args()
    models = {"random": 0, "trained": arguments.train_steps}
    models["trained, router too"] = arguments.train_steps
    for name, steps in models.items():
        out = arguments.out / name
        out.mkdir(parents=True)
        make_model(out / "model", arguments.top_k, steps, frozen="router" not in name)
        config = make_config(out, arguments.engine_dtype, "fp32")
        samples = asyncio.run(sample(config, out, arguments.samples))
        for precision in ("fp32", "bf16"):
            for row in compare(make_config(out, arguments.engine_dtype, precision), samples):
                setting = {"model": name, "engine": arguments.engine_dtype, "trainer": precision}
                print(json.dumps(setting | row), flush=True)


def make_model(folder: Path, top_k: int, steps: int, frozen: bool) -> None:
    """Writes a model; its weights are random, or trained for some steps.

    frozen: the routers keep their small random weights, so that many experts nearly tie, as they do
    where a load-balancing loss keeps them even.
    """
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            moe_intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_experts=EXPERTS,
            num_experts_per_tok=top_k,
            norm_topk_prob=True,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.08 if steps else 0.2,
            dtype="float32",
        )
    )
    for layer in model.model.layers if steps and frozen else ():
        torch.nn.init.normal_(layer.mlp.gate.weight, std=ROUTER_SCALE).requires_grad_(False)
    optimizers, rng = make_optimizers(model), random.Random(0)
    problems = draw_problems("train", 0)
    for _ in range(steps):
        train_step(model, optimizers, encode(tokenizer, list(islice(problems, 64)), Habits(), rng))
    model.to(torch.bfloat16).save_pretrained(folder)  # both sides load the same numbers
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"  # the engine's transformers may be older than this one
    config = json.loads(path.read_text()) | {"num_experts": EXPERTS}
    path.write_text(json.dumps(config))


def make_config(out: Path, engine_dtype: str, precision: str) -> Config:
    return configuration.from_tree(
        {
            "run": {"dir": str(out), "steps": 1},
            "model": {"path": str(out / "model"), "context_tokens": 128},
            "data": {"train": "unused"},
            "rollout": {"max_new_tokens": NEW_TOKENS, "routing_replay": True},
            "algorithm": {"prompts_per_step": 2, "samples_per_prompt": 2},
            "trainer": {"precision": precision, "max_tokens_per_microbatch": 1 << 16},
            "megatron": {"lr": 1e-6},
            "sglang": CPU_ENGINE
            | {"dtype": engine_dtype, "max_total_tokens": 8192, "random_seed": 0},
        }
    )


async def sample(config: Config, out: Path, count: int) -> list[TrainSample]:
    """Returns samples of version 0 with the engine's logprobs and experts."""
    routing = replayed_routing(config)
    assert routing
    tokenizer = make_tokenizer()
    prompts = [tokenizer(p.prompt)["input_ids"] for p in islice(draw_problems("train", 1), count)]
    async with running_server(config, out) as server:
        sampling = Sampling(NEW_TOKENS, 1.0, [])

        async def generate(prompt: list[int]) -> TrainSample:
            output = await server.client.generate(prompt, sampling, experts_from=0)
            tokens = join_segments(np.asarray(prompt, np.int32), output.segments, "length", "")
            experts = CallExperts(routing)
            experts.add(output.experts, len(tokens.ids))
            zeros = np.zeros(len(tokens.ids), np.float32)
            beside = experts.of_tokens(len(tokens.ids))
            return TrainSample(tokens.ids, tokens.logprobs, tokens.versions, zeros, experts=beside)

        return await asyncio.gather(*map(generate, prompts))


def compare(config: Config, samples: list[TrainSample]) -> list[dict[str, Any]]:
    """Returns the mismatch without and with replay."""
    if not torch.distributed.is_initialized():
        parallel.init_parallel(config)
    model = build.build(config)
    maps = list[torch.Tensor]()
    for module in model.modules:
        for layer in module.decoder.layers:
            layer.mlp.router.register_forward_hook(lambda router, inputs, out: maps.append(out[1]))
    rows = []
    for replay in (False, True):
        maps.clear()
        packed = pack(samples, 0, Packing.of(model, config))
        chosen = packed.experts_TLK
        assert chosen is not None
        if not replay:
            plain = [TrainSample(s.ids, s.logprobs, s.versions, s.advantages) for s in samples]
            packed = pack(plain, 0, Packing.of(model, config))
        totals = step.accumulate_gradients(model, [packed], config)
        computed = (chosen != 0).any(dim=2).any(dim=1)  # by the engine
        same = [
            used.gather(1, chosen[:, index].long()).all(dim=1)[computed]
            for index, used in enumerate(maps[:LAYERS])
        ]
        count = totals["compared_tokens"]
        rows.append(
            {
                "routing_replay": replay,
                "tokens": int(count),
                "mismatch_kl": totals["mismatch_kl"] / count,
                "logprob_diff_mean": totals["logprob_diff"] / count,
                "logprob_diff_max": totals["logprob_diff_max"],
                "choices_that_differ": 1 - torch.stack(same).double().mean().item(),
            }
        )
    return rows


if __name__ == "__main__":
    main()
