"""configs/recipes: each is valid, and fits the nodes and GPUs that its header names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import ROOT
from qwen3_shapes import model_config

from megatron_async_rl.config import load
from megatron_async_rl.launcher.placement import assign_nodes
from megatron_async_rl.model import layout, memory
from megatron_async_rl.model.layout import Layout

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
SIZE = re.compile(r"#   (\d+) GPUs: --nodes=(\d+) (.*)")
MAX_TRAINER_GIB = 72  # of 79; the estimate leaves out CUDA contexts, NCCL and fragmentation


def sizes(path: Path) -> list[tuple[int, int, list[str]]]:
    """Returns GPUs, nodes and overrides of each line of the header."""
    joined = path.read_text().replace(" \\\n#     ", " ")
    return [
        (int(gpus), int(nodes), [] if "(as it is)" in rest else rest.split())
        for gpus, nodes, rest in SIZE.findall(joined)
    ]


def test_there_is_a_recipe_for_each_model_and_task() -> None:
    names = {path.stem for path in RECIPES}
    assert names == {
        "qwen3_30b_a3b_math",
        *(f"qwen3_{size}_{task}" for size in ("1.7b", "8b", "14b", "32b") for task in CODE_OR_MATH),
    }


CODE_OR_MATH = ("code", "math")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_every_size_of_its_header(path: Path, tmp_path: Path) -> None:
    found = sizes(path)
    assert found[0][0] <= 32 and found[-1][0] == 512
    assert [overrides for _, _, overrides in found].count([]) == 1
    for gpus, nodes, overrides in found:
        config = load.load(path, overrides)
        assert gpus == 8 * nodes == config.trainer_ranks + config.rollout.servers * config.engine_tp
        placed = assign_nodes(config, nodes, 8)
        assert placed.warnings() == []
        hf = model_config(Path(config.model.path).name, tmp_path)
        layout.check(Layout.from_config(config), hf.shape())
        trainer, server = memory.trainer_memory(config, hf), memory.server_memory(config, hf)
        assert trainer.peak / memory.GIB < MAX_TRAINER_GIB
        pool = (config.sglang["mem_fraction_static"] * 79 * memory.GIB - server.weights) / (
            server.kv_per_token
        )
        assert pool > 8000 * config.rollout.max_concurrent_samples
        if not overrides:
            stated = re.search(r"trainer (\d+) GiB.*servers ([\d.]+) GiB", path.read_text())
            assert stated
            assert int(stated[1]) == round(trainer.peak / memory.GIB)
            assert float(stated[2]) == round(server.weights / memory.GIB, 1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_has_the_published_hyper_parameters(path: Path) -> None:
    """arXiv 2505.24298, table 3; AReaL's boba2 release for code."""
    config = load.load(path)
    algorithm, megatron, is_math = config.algorithm, config.megatron, path.stem.endswith("_math")
    batch = (algorithm.prompts_per_step, algorithm.samples_per_prompt, algorithm.minibatches)
    assert batch == ((512, 16, 4) if is_math else (128, 16, 1))
    assert config.staleness.max_staleness == (8 if is_math else 16)
    rates = (algorithm.filters.success_rate_min, algorithm.filters.success_rate_max)
    assert rates == ((None, None) if is_math else (0.05, 0.95))
    adam = ("lr", "adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "clip_grad")
    assert [megatron[name] for name in adam] == [2e-5, 0.9, 0.95, 1e-5, 0.05, 1.0]
    assert config.rollout.max_new_tokens == 27648 and config.model.context_tokens == 28672
    assert (algorithm.loss.clip_eps, algorithm.reward_shaping.scale) == (0.2, 5.0)
    assert "This recipe has not been run" in path.read_text()
