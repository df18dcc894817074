"""The experts that a real SGLang returns are those of the routers in transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import torch
from model_shapes import make_model_folder
from needs import needs_engine
from tiny_model import CPU_ENGINE

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.model.routing import replayed_routing
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.engine_process import SGLangServer
from megatron_async_rl.rollout.samples.routing import CallExperts

pytestmark = needs_engine
PROMPTS = [[3, 4, 5, 6, 7], [3, 4, 5, 40, 41, 42, 43], [9]]


def replaying(folder: Path) -> Config:
    for name in ("logs", "keys"):
        (folder / name).mkdir()
    return configuration.from_tree(
        {
            "run": {"dir": str(folder), "steps": 1},
            "model": {"path": str(folder / "model"), "context_tokens": 64},
            "data": {"train": "unused"},
            "rollout": {"max_new_tokens": 32, "routing_replay": True},
            "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
            "sglang": CPU_ENGINE,
        }
    )


async def generated(server: SGLangServer, prompt: list[int], experts: CallExperts) -> list[int]:
    """Generates with two requests, as around an interruption; the second has a cached prefix."""
    tokens = list(prompt)
    for count in (7, 5):
        output = await server.client.generate(
            tokens, Sampling(count, 1.0, []), experts_from=experts.num_known
        )
        tokens += [token for segment in output.segments for token in segment.ids]
        assert output.experts is not None
        experts.add(output.experts, len(tokens))
    assert output.num_cached > 0
    return tokens


def test_experts_of_the_engine_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model_folder(tmp_path / "model", "qwen3_moe", scale=0.3)
    config = replaying(tmp_path)
    routing = replayed_routing(config)
    assert routing

    async def sampled() -> list[tuple[list[int], CallExperts]]:
        server = SGLangServer(config, tmp_path, "rollout-0")
        try:
            await server.start()
            await server.client.relabel(0)
            calls = [CallExperts(routing) for _ in PROMPTS]
            both = zip(PROMPTS, calls, strict=True)
            tokens = await asyncio.gather(*(generated(server, *one) for one in both))
            return list(zip(tokens, calls, strict=True))
        finally:
            await server.stop()

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for tokens, experts in asyncio.run(sampled()):
        with torch.no_grad():
            out = reference(input_ids=torch.tensor([tokens]), output_router_logits=True)
        best = torch.stack([logits.topk(3).values for logits in out.router_logits], 1)
        own = torch.stack([logits.topk(2).indices for logits in out.router_logits], 1)
        beside = experts.of_tokens(len(tokens)).reshape(-1, routing.num_layers, routing.top_k)
        is_equal = (np.sort(beside[1:]) == np.sort(own[:-1].numpy())).all(-1)
        is_tie = (best[:-1, :, 1] - best[:-1, :, 2]).numpy() < 1e-5  # either may be chosen
        assert (is_equal | is_tie).all()
        assert not beside[0].any()
