"""tools/convert_checkpoint.py: to Megatron in one layout and back in another, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from model_shapes import make_model_folder, weights_config_tree
from paths import ROOT
from safetensors.torch import load_file


def convert(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    command = [*torchrun, str(ROOT / "tools" / "convert_checkpoint.py"), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=150, check=False
    )


@pytest.mark.parametrize(
    "family, written, read",
    [
        (
            "qwen2",
            {"tensor_model": 2, "pipeline_model": 2},
            {"tensor_model": 1, "pipeline_model": 2},
        ),
        ("qwen3_moe", {"expert_model": 2}, {"tensor_model": 2}),
    ],
)
def test_checkpoint_survives_conversion_between_layouts(
    tmp_path: Path, family: str, written: dict[str, int], read: dict[str, int]
) -> None:
    source = make_model_folder(tmp_path / "source", family)
    config = tmp_path / "config.yaml"
    for sizes, command in (
        (written, ["to-megatron", str(config), str(tmp_path / "megatron")]),
        (read, ["to-hf", str(config), str(tmp_path / "megatron"), str(tmp_path / "back")]),
    ):
        tree = weights_config_tree(source, sizes, {})
        ranks = 2 if sizes != written or family == "qwen3_moe" else 4
        tree["trainer"]["data_parallel_size"] = (
            ranks // sizes.get("tensor_model", 1) // sizes.get("pipeline_model", 1)
        )
        config.write_text(yaml.safe_dump(tree))
        done = convert(ranks, *command)
        assert done.returncode == 0, done.stderr[-4000:]
    want = load_file(source / "model.safetensors")
    got = {
        name: t
        for file in (tmp_path / "back").glob("*.safetensors")
        for name, t in load_file(file).items()
    }
    assert set(got) == set(want)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
