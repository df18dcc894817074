"""Model FLOPs against a count by hand and PyTorch's flop counter; utilization from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_model import make_model
from torch.utils.flop_counter import FlopCounterMode

from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.flops import NOMINAL_TFLOPS, ModelFlops, nominal_tflops

LENGTH = 24


def flops_of(folder: Path) -> ModelFlops:
    hf = HfConfig(folder)
    return ModelFlops.of(hf.shape(), hf.architecture().router_top_k)


def counted(model: torch.nn.Module) -> int:
    """Returns the FLOPs of forward and backward over one sequence; attention is not causal here."""
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(torch.arange(LENGTH)[None] % 30, use_cache=False).logits
        logits.sum().backward()
    return counter.get_total_flops()


def test_dense_model_takes_the_flops_that_pytorch_counts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    flops = flops_of(make_model(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    whole_attention = 12 * LENGTH**2 * flops.attention_width
    assert counted(model) == pytest.approx(
        6 * LENGTH * flops.weights + whole_attention, rel=0.002
    )  # PyTorch counts the products of RoPE's angles too
    causal = flops.training([LENGTH])
    assert causal == 6 * LENGTH * flops.weights + whole_attention / 2


def test_experts_count_as_often_as_the_router_selects(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=80, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=8, num_experts_per_tok=3, norm_topk_prob=True,
    )  # fmt: skip
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = Qwen3MoeForCausalLM(config)
    # this version of transformers writes `num_local_experts`
    raw = config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    flops = flops_of(tmp_path)
    expected = 6 * LENGTH * flops.weights + 12 * LENGTH**2 * flops.attention_width
    assert counted(model) == pytest.approx(expected, rel=0.002)


def test_sizes_match_a_count_by_hand(tmp_path: Path) -> None:
    hf = HfConfig(make_model(tmp_path)).raw
    h, f, d = hf["hidden_size"], hf["intermediate_size"], hf["head_dim"]
    heads, groups = hf["num_attention_heads"], hf["num_key_value_heads"]
    queries_and_output, keys_and_values, gate_up_down = (
        2 * h * heads * d,
        2 * h * groups * d,
        3 * h * f,
    )
    layer = queries_and_output + keys_and_values + gate_up_down
    flops = flops_of(tmp_path)
    assert flops.weights == hf["num_hidden_layers"] * layer + h * hf["vocab_size"]
    assert flops.attention_width == hf["num_hidden_layers"] * heads * d
    assert flops.training([flops.attention_length]) == pytest.approx(  # type: ignore[list-item]
        12 * flops.weights * flops.attention_length
    )


@pytest.mark.parametrize(
    ("device", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA H800", 989.0),
        ("NVIDIA H800 PCIe", 756.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_rate_is_that_of_the_board(device: str, rate: float | None) -> None:
    assert nominal_tflops(device) == rate
    assert rate is None or rate in NOMINAL_TFLOPS.values()
