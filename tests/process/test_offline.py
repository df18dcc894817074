"""The commands `replay` and `selftest`: trainer ranks without a controller or servers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from paths import ROOT
from tiny_model import make_model
from train_samples import make_train_samples

from megatron_async_rl.storage import batches


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    tree = {
        "run": {"dir": str(folder), "steps": 10},
        "model": {"path": str(make_model(folder / "model")), "context_tokens": 64},
        "data": {"train": "unused"},
        "rollout": {"max_new_tokens": 32},
        "algorithm": {"prompts_per_step": 8, "samples_per_prompt": 2, "minibatches": 2},
        "trainer": {"precision": "fp32", "max_tokens_per_microbatch": 64},
        "megatron": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "lr": 1e-3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


def command(
    *arguments: str, repository: Path = ROOT, modules: Path | None = None
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, filter(None, (repository, modules))))
    env = os.environ | {"PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "megatron_async_rl", *arguments],
        env=env,
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=200,
    )


OWN = """
import numpy as np

def advantage(rewards, lengths, config):
    return [[np.linspace(-a, a, n) for a, n in zip(row, tokens)]
            for row, tokens in zip(rewards, lengths)]

def objective(inputs, config):
    ratio_T = (inputs.logprobs_T - inputs.old_T).exp()
    return -inputs.advantages_T * ratio_T, {"advantage": inputs.advantages_T}

def averaged(inputs, config):
    return objective(inputs, config)[0] / inputs.mask_T.sum().clamp(min=1)
"""


def test_own_objective_trains_a_batch_and_its_metrics_are_reported(
    run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "our_offline.py").write_text(OWN)
    batches.save(tmp_path / "v4.npz", 4, make_train_samples(16))
    changes = [
        "algorithm.loss.objective=our_offline:objective",
        "megatron.tensor_model_parallel_size=1",
        "megatron.sequence_parallel=false",
        "megatron.pipeline_model_parallel_size=2",  # the first stage computes no loss
    ]
    config = ["--config", str(run_dir / "config.yaml")]
    done = command("replay", str(tmp_path / "v4.npz"), *changes, *config, modules=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = dict(line.split() for line in done.stdout.splitlines()[1:])
    generated = [s.advantages[s.versions >= 0] for s in make_train_samples(16)]
    mean = float(np.concatenate(generated).mean())
    assert float(figures["train/user/advantage"]) == pytest.approx(mean, abs=1e-5)
    assert float(figures["train/grad_norm"]) > 0


def test_selftest_names_what_an_own_objective_breaks(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "our_offline.py").write_text(OWN)
    changes = [
        "algorithm.advantage.estimator=our_offline:advantage",
        "algorithm.loss.objective=our_offline:averaged",
    ]
    done = command("selftest", str(run_dir / "config.yaml"), *changes, modules=tmp_path)
    assert done.returncode != 0
    first, second = done.stdout.splitlines()
    assert first == "algorithm.advantage.estimator = our_offline:advantage: 6 checks passed"
    assert second.startswith("FAILED algorithm.loss.objective = our_offline:averaged: cuts: ")
    assert "algorithm.loss.objective = our_offline:averaged breaks rules" in done.stderr


def test_replay_of_a_nan_batch_fails_and_writes_nothing(run_dir: Path) -> None:
    batches.save(
        run_dir / "refused" / "v5-replica0.npz", 5, make_train_samples(16, bad=float("nan"))
    )
    before = {p.name for p in (run_dir / "refused").iterdir()}
    done = command(
        "replay", str(run_dir / "refused" / "v5-replica0.npz"), "--set", "algorithm.minibatches=1"
    )
    assert done.returncode != 0 and "training step 5: loss nan" in done.stderr
    assert {p.name for p in (run_dir / "refused").iterdir()} == before


def test_replay_rejects_batches_of_different_steps(run_dir: Path, tmp_path: Path) -> None:
    for version in (1, 2):
        batches.save(tmp_path / f"{version}.npz", version, make_train_samples(2))
    done = command(
        "replay",
        str(tmp_path / "1.npz"),
        str(tmp_path / "2.npz"),
        "--config",
        str(run_dir / "config.yaml"),
    )
    assert done.returncode != 0 and "versions [1, 2]" in done.stderr


def test_selftest_of_an_interleaved_pipeline_agrees(run_dir: Path, tmp_path: Path) -> None:
    changes = [
        f"model.path={make_model(tmp_path / 'model', layers=4)}",
        "megatron.pipeline_model_parallel_size=2",
        "megatron.virtual_pipeline_model_parallel_size=2",
        "megatron.pipeline_model_parallel_layout=Ett|t||tL",  # chunks of unequal size
    ]
    done = command(
        "selftest", str(run_dir / "config.yaml"), "megatron.tensor_model_parallel_size=1", *changes
    )
    assert done.returncode == 0, done.stderr
    assert "\n2 ranks" in done.stdout and "47 of 47 gradients agree" in done.stdout


MOE = {  # selftest reduces its size
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    "layout",
    [
        {"expert_model_parallel_size": 2},
        {  # experts split by tensor parallelism gather unequal shares, which gloo cannot
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
        },
        {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {"context_parallel_size": 2},
    ],
    ids=lambda layout: " ".join(layout),
)
def test_selftest_of_expert_and_context_parallelism_agrees(
    run_dir: Path, tmp_path: Path, layout: dict[str, object]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    tree["model"]["path"] = str(tmp_path)
    tree["trainer"]["data_parallel_size"] = 1 if "context_parallel_size" in layout else 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | {"megatron": layout}))
    done = command("selftest", str(tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr
    assert "69 of 69 gradients agree" in done.stdout


def test_selftest_names_the_parameter_of_a_planted_fault(run_dir: Path, tmp_path: Path) -> None:
    """Norms are not marked for sequence parallelism: each rank has only its tokens' gradients."""
    for folder in ("megatron_async_rl", "patches"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    layers = tmp_path / "megatron_async_rl" / "trainer" / "model" / "layers.py"
    marked = "weight.sequence_parallel = config.sequence_parallel"
    assert marked in layers.read_text()
    layers.write_text(layers.read_text().replace(marked, "weight.sequence_parallel = False"))
    done = command("selftest", str(run_dir / "config.yaml"), repository=tmp_path)
    assert done.returncode != 0
    assert (
        "the first parameter that differs is model.layers.0.input_layernorm.weight" in done.stderr
    )
