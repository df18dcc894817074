"""Qwen3-MoE in Megatron equals Qwen3-MoE in transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from model_shapes import make_model_folder
from paths import SUPPORT, python_environment


def test_moe_logits_match_transformers_and_a_step_trains(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model_folder(tmp_path / "model", "qwen3_moe", scale=0.2)
    environment = python_environment(TORCHDYNAMO_DISABLE="1")
    command = [sys.executable, str(SUPPORT / "moe_main.py"), str(folder), str(tmp_path / "out.pt")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        want = reference(input_ids=out["ids"][None].long()).logits[0]
    assert torch.allclose(out["logits"], want, atol=2e-4 * want.abs().max().item())
    assert 0 < out["grad_norm"] < float("inf")
