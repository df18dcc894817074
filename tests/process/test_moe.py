"""Models with experts in Megatron, grouped and sequential, equal those in transformers.

Qwen3-MoE; GLM-4.5-Air: shared experts, a dense first layer, a bias in the router, partial RoPE.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_shapes import make_model_folder
from paths import SUPPORT, python_environment
from safetensors.torch import load_file


@pytest.fixture(scope="module", params=["qwen3_moe", "glm4_moe"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("moe") / "model", request.param, scale=0.2)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    out = folder.parent / "out.pt"
    environment = python_environment(TORCHDYNAMO_DISABLE="1")
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "moe_main.py"), str(folder), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=True)


def test_moe_logits_match_transformers(folder: Path, results: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        want = reference(input_ids=results["ids"][None].long()).logits[0]
    for experts in ("grouped", "sequential"):
        got = results[experts]["logits"]
        assert torch.allclose(got, want, atol=2e-4 * want.abs().max().item()), experts


def test_grouped_and_sequential_experts_have_the_same_gradients(results: dict[str, Any]) -> None:
    grouped, sequential = results["grouped"], results["sequential"]
    assert 0 < grouped["grad_norm"] < float("inf")
    assert set(grouped["gradients"]) == set(sequential["gradients"])
    for name, want in sequential["gradients"].items():
        torch.testing.assert_close(grouped["gradients"][name], want, rtol=1e-4, atol=1e-6)
    assert any("experts.3.down_proj" in name for name in grouped["gradients"])


def test_auxiliary_loss_reaches_the_router(results: dict[str, Any]) -> None:
    router = "model.layers.1.mlp.gate.weight"
    without, with_loss = (
        results[name]["gradients"][router] for name in ("grouped", "auxiliary loss")
    )
    assert (with_loss - without).abs().max() > 0.01 * without.abs().max()
    torch.testing.assert_close(results["auxiliary loss"]["logits"], results["grouped"]["logits"])


def test_bias_of_a_router_is_kept_in_float32_beside_bf16_weights(
    folder: Path, results: dict[str, Any]
) -> None:
    stored = load_file(folder / "model.safetensors")
    biases = [name for name in stored if name.endswith("e_score_correction_bias")]
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"] - config.get("first_k_dense_replace", 0)
    assert len(biases) == ("n_routed_experts" in config) * layers
    for name, tensor in results["bf16"].items():
        want = stored[name] if name in biases else stored[name].bfloat16()
        assert torch.equal(tensor.to(want.dtype), want), name


def test_checkpoints_of_grouped_and_sequential_experts_are_interchangeable(
    results: dict[str, Any],
) -> None:
    want = results["grouped"]["logits after"]
    assert not torch.allclose(want, results["grouped"]["logits"])
    for got in results["loaded"]:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
