"""Layouts that need NCCL against TP1 PP1 CP1 on the same ranks; run by test_gpu_layouts.py.

One process a GPU under torchrun. The comparison is that of the `selftest` command; the figures are
written to a JSON file, which the tests check.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

import msgspec
import torch
import torch.distributed as dist

from megatron_async_rl.config import load as configuration
from megatron_async_rl.trainer import selftest

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 251,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
MOE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
# name -> model, precision, `megatron:`, number of ranks it needs
LAYOUTS: dict[str, tuple[dict[str, Any], str, dict[str, Any], int]] = {
    "tp2": (DENSE, "fp32", {"tensor_model_parallel_size": 2}, 2),
    "tp2 sp": (DENSE, "fp32", TP2, 2),
    "tp2 sp recompute": (DENSE, "fp32", TP2 | RECOMPUTE, 2),
    "tp2 sp overlap": (DENSE, "fp32", TP2 | {"tp_comm_overlap": True}, 2),
    "bf16 tp2 sp overlap": (DENSE, "bf16", TP2 | {"tp_comm_overlap": True}, 2),
    "pp2": (DENSE, "fp32", {"pipeline_model_parallel_size": 2}, 2),
    "bf16 tp2 sp": (DENSE, "bf16", TP2, 2),
    "bf16 pp2": (DENSE, "bf16", {"pipeline_model_parallel_size": 2}, 2),
    "moe ep2": (MOE, "fp32", {"expert_model_parallel_size": 2}, 2),
    "moe tp2 sp ep2": (
        MOE,
        "fp32",
        TP2 | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        2,
    ),
    "moe tp2 sp experts tp2": (MOE, "fp32", TP2 | {"expert_tensor_parallel_size": 2}, 2),
    "moe tp2 sp ep2 experts tp2": (
        MOE,
        "fp32",
        TP2 | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
        4,
    ),
    "moe pp2": (MOE, "fp32", {"pipeline_model_parallel_size": 2}, 2),
}


def run(name: str, ranks: int, folder: Path) -> dict[str, Any]:
    model, precision, megatron, _ = LAYOUTS[name]
    if dist.get_rank() == 0:
        (folder / "config.json").write_text(json.dumps(model))
    dist.barrier()
    split = megatron.get("tensor_model_parallel_size", 1) * megatron.get(
        "pipeline_model_parallel_size", 1
    )
    config = configuration.from_tree(
        {
            "run": {"dir": str(folder / "run"), "steps": 1},
            "model": {"path": str(folder), "context_tokens": 120, "random_init": True},
            "data": {"train": "unused"},
            "rollout": {"max_new_tokens": 60},
            "algorithm": {"prompts_per_step": 8, "samples_per_prompt": 2},
            "trainer": {"data_parallel_size": ranks // split},
            "megatron": megatron,
        }
    )
    figures = []
    for variant in selftest.variants(config, folder).values():
        tree = msgspec.to_builtins(variant)
        tree["trainer"]["precision"] = precision
        figures.append(selftest.gradients(configuration.from_tree(tree)))
    (yours, got), (plain, want) = figures
    if dist.get_rank() != 0:
        return {}
    return {
        "loss": [yours["loss"], plain["loss"]],
        "tokens": [yours["tokens"], plain["tokens"]],
        "largest": max(abs(array).max() for array in want.values()).item(),
        "differences": selftest.compare(got, want),
    }


if __name__ == "__main__":
    out, ranks = Path(sys.argv[1]), int(sys.argv[2])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    results = {}
    for name, (*_, needed) in LAYOUTS.items():
        if ranks % needed == 0:
            results[name] = run(name, ranks, out.parent)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()
