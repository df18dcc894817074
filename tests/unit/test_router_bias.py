"""Biases of routers, which are buffers: in the reference policy and in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from msgspec.structs import replace
from torch import Tensor

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

from config_builders import trainer_config
from model_shapes import make_model_folder

from megatron_async_rl.trainer import parallel
from megatron_async_rl.trainer.algorithms.reference import reference_weights
from megatron_async_rl.trainer.model import build
from megatron_async_rl.trainer.model.build import TrainerModel, build_modules
from megatron_async_rl.weights.reshard import own_tensors


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends the process group of this process with the test."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    threads = torch.get_num_threads()
    yield
    if dist.is_initialized():
        parallel.leave_parallel()
        dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_rank")
def test_reference_has_the_biases_of_the_model_and_leaves_the_trained_ones(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", "glm4_moe")
    config = trainer_config()
    config = replace(config, model=replace(config.model, path=str(folder)))
    parallel.init_parallel(config)
    transformer, shape, modules = build_modules(config)
    model = TrainerModel(transformer, shape, modules, [], None, None, parallel.device())  # type: ignore[arg-type]

    def weights() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in own_tensors(modules, shape)}

    started = weights()
    with torch.no_grad():
        for tensor in (*model.parameters(), *modules[0].buffers()):
            tensor += 1
    trained = weights()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(trained[name], started[name] + 1)
    with reference_weights(model, config):
        reference = weights()
    after = weights()
    assert reference.keys() == started.keys() == after.keys()
    assert [n for n in started if not torch.equal(reference[n], started[n])] == []
    assert [n for n in started if not torch.equal(after[n], trained[n])] == []


@pytest.mark.usefixtures("one_rank")
def test_bias_and_counts_of_a_router_stay_in_float32(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", "glm4_moe")
    config = trainer_config("bf16")
    config = replace(config, model=replace(config.model, path=str(folder)))
    parallel.init_parallel(config)
    transformer, _, [module] = build_modules(config)
    router = module.decoder.layers[1].mlp.router
    bias = router.expert_bias.clone()
    build._in_half_precision(transformer, module)
    assert torch.equal(router.expert_bias, bias) and router.weight.dtype == torch.bfloat16
    for _ in range(600):
        router._apply_expert_bias(torch.ones(1, 4, dtype=torch.bool))
    assert router.local_tokens_per_expert.tolist() == [600] * 4
