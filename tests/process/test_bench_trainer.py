"""Runs tools/bench/bench_trainer.py on the CPU.

Checks the packing figures that it reports, and that every split into micro-batches trains the same
tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from paths import ROOT, TOOLS

from megatron_async_rl.trainer.data.packing import allocate, cost

SCENARIO = "model=tiny,layers=1,mix=64-256,tokens=1500,budget=512,steps=1"
CUTTINGS = ("dynamic", "fixed", "5")


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench") / "figures.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
    ]
    command += [str(TOOLS / "bench" / "bench_trainer.py"), "--json", str(out)]
    command += [f"{SCENARIO},cutting={cutting}" for cutting in CUTTINGS]
    environment = os.environ | {
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {figure["cutting"]: figure for figure in map(json.loads, out.read_text().splitlines())}


def sample_lengths_and_attention_length() -> tuple[list[int], float]:
    sys.path.insert(0, str(TOOLS / "bench"))
    try:
        import bench_models
        import trainer_scenarios as scenarios
    finally:
        sys.path.pop(0)
    shape = bench_models.SHAPES["tiny"]
    lengths = [len(s.ids) for s in scenarios.samples_of("64-256", 1500, shape["vocab_size"])]
    # length at which causal attention (6 n^2 H D) costs as much as the products (6 n weights)
    h, d, heads, groups = (
        shape[k] for k in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads")
    )
    weights = (
        2 * h * d * (heads + groups) + 3 * h * shape["intermediate_size"] + h * shape["vocab_size"]
    )
    return lengths, weights / (heads * d)


def test_microbatch_splits_train_the_same_tokens(figures: dict[str, dict[str, Any]]) -> None:
    lengths, _ = sample_lengths_and_attention_length()
    assert {f["tokens"] for f in figures.values()} == {sum(lengths)}
    assert {f["samples"] for f in figures.values()} == {len(lengths)}


def test_packing_efficiency_and_imbalance_match_the_split(
    figures: dict[str, dict[str, Any]],
) -> None:
    lengths, attention_length = sample_lengths_and_attention_length()
    everything = range(len(lengths))
    cuts = {
        "dynamic": allocate(lengths, 512),
        "fixed": [
            list(everything[n : n + 2]) for n in everything[::2]
        ],  # two samples of 256 tokens always fit
    }
    for name, cut in cuts.items():
        costs = [sum(cost(lengths[n], attention_length) for n in part) for part in cut]
        assert figures[name]["packing"] == pytest.approx(sum(lengths) / (512 * len(cut)))
        assert figures[name]["imbalance"] == pytest.approx(max(costs) * len(costs) / sum(costs))
    assert figures["5"]["packing"] == pytest.approx(sum(lengths) / (512 * 5))
    assert figures["dynamic"]["packing"] > figures["fixed"]["packing"]
