"""The memory estimate against the peaks that docs/results/2026-11-trainer.md measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_builders import config_tree
from qwen3_shapes import model_config

from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import DataError
from megatron_async_rl.launcher import slurm
from megatron_async_rl.model import memory

FULL = {
    "megatron.recompute_granularity": "full",
    "megatron.recompute_method": "uniform",
    "megatron.recompute_num_layers": 1,
}
TP2 = {"megatron.tensor_model_parallel_size": 2, "megatron.sequence_parallel": True}
MEASURED_GIB = [  # model, layers, settings, torch's peak on an H200
    ("Qwen3-8B", 36, TP2, 124.7),
    ("Qwen3-8B", 36, TP2, 125.9),  # shorter samples in the packs
    ("Qwen3-8B", 12, {}, 109.3),
    ("Qwen3-8B", 12, {}, 110.4),
    ("Qwen3-1.7B", 28, {}, 86.4),
    ("Qwen3-8B", 24, FULL, 123.1),
    ("Qwen3-1.7B", 28, FULL, 50.7),
]


def config(folder: Path, **settings: Any) -> Config:
    standard = {
        "model.path": str(folder),
        "trainer.max_tokens_per_microbatch": 32768,
        "sglang.dtype": "bfloat16",
    }
    return load.from_tree(config_tree(**(standard | settings)))


@pytest.mark.parametrize(("model", "layers", "settings", "measured"), MEASURED_GIB)
def test_estimate_is_within_a_tenth_of_the_measured_peak(
    model: str, layers: int, settings: dict[str, Any], measured: float, tmp_path: Path
) -> None:
    hf = model_config(model, tmp_path, num_hidden_layers=layers)
    estimate = memory.trainer_memory(config(tmp_path, **settings), hf)
    assert estimate.peak / memory.GIB == pytest.approx(measured, rel=0.02)


def test_memory_is_split_as_the_layout_says(tmp_path: Path) -> None:
    hf = model_config("Qwen3-8B", tmp_path)
    one = memory.trainer_memory(config(tmp_path), hf)
    replicas = memory.trainer_memory(config(tmp_path, **{"trainer.data_parallel_size": 2}), hf)
    assert replicas.optimizer == one.optimizer / 2 and replicas.weights == one.weights
    stages = memory.trainer_memory(
        config(tmp_path, **{"megatron.pipeline_model_parallel_size": 2}), hf
    )
    assert stages.weights == one.weights / 2 and stages.activations == one.activations
    reference = memory.trainer_memory(config(tmp_path, **{"algorithm.kl.coef": 0.1}), hf)
    assert reference.peak == one.peak + one.weights
    experts = model_config("Qwen3-30B-A3B", tmp_path)
    spread = {"megatron.expert_model_parallel_size": 8, "trainer.data_parallel_size": 8}
    all_experts = memory.trainer_memory(config(tmp_path), experts)
    eighth = memory.trainer_memory(config(tmp_path, **spread), experts)
    expert_bytes = 48 * 128 * 3 * 2048 * 768 * 2
    assert all_experts.weights - eighth.weights == expert_bytes * 7 / 8


def test_shared_experts_save_activations_too(tmp_path: Path) -> None:
    glm = {
        "architectures": ["Glm4MoeForCausalLM"], "hidden_size": 4096, "head_dim": 128,
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128,
        "num_experts_per_tok": 8, "first_k_dense_replace": 1, "vocab_size": 151552,
        "norm_topk_prob": True, "attention_bias": True,
    }  # fmt: skip
    one, two = (
        memory.trainer_memory(
            config(tmp_path), model_config("Qwen3-8B", tmp_path, **glm, n_shared_experts=count)
        )
        for count in (1, 2)
    )
    gate_and_up = 2 * 1408
    assert two.activations - one.activations == 2 * 32768 * 46 * gate_and_up


def test_server_holds_its_share_of_weights_and_cache(tmp_path: Path) -> None:
    hf = model_config("Qwen3-8B", tmp_path)
    server = memory.server_memory(config(tmp_path), hf)
    assert server.weights == pytest.approx(16.38e9, rel=0.001)  # docs/results/2026-11-weights.md
    assert server.kv_per_token == 2 * 36 * 8 * 128 * 2
    wide = memory.server_memory(config(tmp_path, **{"sglang.tp_size": 16}), hf)
    assert wide.kv_per_token == server.kv_per_token / 8  # eight KV heads, replicated


def test_plan_prints_the_estimate_or_why_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(load.dump(config(tmp_path / "model")))
    with pytest.raises(DataError):
        memory.summary(load.load(path))
    assert slurm.show(str(path), [], 1, 8) == 0
    assert "GPU memory is not estimated" in capsys.readouterr().out
    (tmp_path / "model").mkdir()
    model_config("Qwen3-8B", tmp_path / "model")
    assert slurm.show(str(path), [], 1, 8) == 0
    output = capsys.readouterr().out
    assert "GiB per GPU at the peak (weights 15.3, gradients 30.5" in output
    assert "15.3 GiB of weights per GPU" in output
