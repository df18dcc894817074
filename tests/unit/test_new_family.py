"""Adds a model family as docs/weights.md describes: one table entry is enough."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_shapes import plan_config
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.launcher.preflight import config_checks
from megatron_async_rl.model import families, weight_plan
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.families import ATTENTION, FAMILIES, MLP, Family
from megatron_async_rl.model.shape import parameter_names
from megatron_async_rl.weights.digest import EngineDigests
from megatron_async_rl.weights.load import SafetensorsFolder
from megatron_async_rl.weights.mapping import from_hf, to_hf

NEW = Family("mistral", "MistralForCausalLM", ATTENTION + MLP)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a tiny Mistral with transformers."""
    from transformers import MistralConfig, MistralForCausalLM

    path = tmp_path_factory.mktemp("mistral")
    sizes = {
        "vocab_size": 51,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    MistralForCausalLM(
        MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=None)
    ).save_pretrained(path)
    return path


def test_one_entry_maps_every_tensor_that_transformers_wrote(
    mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="MistralForCausalLM is not supported"):
        _ = HfConfig(mistral).family
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, NEW))
    model, folder = HfConfig(mistral), SafetensorsFolder(mistral)
    written = load_file(mistral / "model.safetensors")
    assert model.architecture().family is NEW
    config = plan_config(
        mistral, model.raw, data_parallel=1, tensor_model=2, pipeline_model=2, engine=2
    )
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(mistral / "tokenizer.json"))
    checks = {check.name: check for check in config_checks(config, print)}
    assert checks["architecture"].ok and "Mistral" in checks["architecture"].detail
    routes = weight_plan.make(config, 50.0).routes
    assert {route.tensor: tuple(route.shape) for route in routes} == {
        n: tuple(t.shape) for n, t in written.items()
    }
    shape = model.shape(2)
    digests = EngineDigests(shape, engine_tp=2)
    for name in parameter_names(shape):
        shards = [from_hf(name, folder.read, shape, rank, 2) for rank in range(2)]
        is_cut = next(route.split for route in routes if route.parameter == name) is not None
        for hf, tensor in to_hf(name, shards if is_cut else shards[:1], shape):
            assert torch.equal(tensor, written[hf]), hf
            digests.add(hf, tensor)
    # per engine rank: tensors outside layers, and fused tensors of a layer
    assert len(digests.result()) == 2 * (3 + 2 * 6)


def test_entry_with_a_wrong_rule_is_rejected_by_the_plan(
    mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in (ATTENTION + MLP[:-1], ATTENTION[:1] + MLP):  # no down_proj; no qkv
        monkeypatch.setattr(
            families, "FAMILIES", (*FAMILIES, Family("mistral", "MistralForCausalLM", wrong))
        )
        config = plan_config(mistral, HfConfig(mistral).raw, engine=2)
        with pytest.raises(ConfigError, match="engine tensors without a source"):
            weight_plan.make(config, 50.0)
