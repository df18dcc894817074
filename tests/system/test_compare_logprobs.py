"""`compare-logprobs` with the real engine and trainer: agreement, and a difference that is planted.

SGLang takes settings of the model from sglang.json_model_override_args, the trainer does not.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from needs import needs_engine
from paths import ROOT
from tiny_model import CPU_ENGINE, make_dataset, make_model

pytestmark = needs_engine


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tree = {
        "run": {"dir": str(folder / "run"), "steps": 1},
        "model": {"path": str(make_model(folder / "model")), "context_tokens": 64},
        "data": {"train": str(make_dataset(folder / "train.jsonl", 8))},
        "rollout": {"max_new_tokens": 32},
        "algorithm": {"prompts_per_step": 8, "samples_per_prompt": 2},
        "trainer": {"precision": "fp32", "max_tokens_per_microbatch": 64},
        "megatron": {"lr": 1e-3},
        "sglang": CPU_ENGINE,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def compare(config: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_async_rl", "compare-logprobs", str(config)]
    return subprocess.run(
        [*command, *settings], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )


def test_engine_and_parallel_trainer_agree(config: Path) -> None:
    layout = ("tensor_model_parallel_size=2", "sequence_parallel=true")
    done = compare(config, *(f"megatron.{setting}" for setting in layout))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agree within rounding in all compared operations" in done.stdout
    operations = done.stdout.split("\n")[0].split()
    assert {"qkv", "attention", "residual"} <= set(operations)
    means = re.findall(r"mean absolute difference (\S+),", done.stdout)
    assert len(means) == 2
    assert all(float(mean) < 1e-4 for mean in means)


def test_difference_is_localised_over_pipeline_stages(config: Path) -> None:
    """The rotary embedding is first used in the attention of layer 0."""
    rotary = '{"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}'
    stages = "megatron.pipeline_model_parallel_size=2"
    done = compare(config, stages, f"sglang.json_model_override_args={rotary}", "--prompts=2")
    assert done.returncode != 0
    assert "first operation that differs by more than rounding is layer 0: attention:" in (
        done.stderr
    )
    assert "rope_theta" in done.stderr
    assert re.search(r"^ +1 .*\*", done.stdout, re.MULTILINE), done.stdout  # of the second stage
