"""The parameter tables: complete names, and shards that rebuild the full tensors in any layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_shapes import tiny_shape
from safetensors.torch import save_file

from megatron_async_rl.errors import DataError
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.families import FAMILIES, Family
from megatron_async_rl.model.shape import (
    ModelShape,
    map_parameter,
    num_parameters,
    parameter_names,
    shard_shape,
)
from megatron_async_rl.weights.load import SafetensorsFolder
from megatron_async_rl.weights.mapping import from_hf, to_hf


def parameters(shape: ModelShape) -> list[str]:
    return list(parameter_names(shape))


def shard(name: str, full: torch.Tensor, shape: ModelShape, rank: int, tp: int) -> torch.Tensor:
    """Returns the shard of a full Megatron parameter that rank `rank` holds."""
    hf = dict(to_hf(name, [full], shape))
    return from_hf(name, lambda piece, index: hf[piece][index], shape, rank, tp)


def unshard(name: str, shards: list[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """Returns the full Megatron parameter from the shards of all ranks."""
    hf = dict(to_hf(name, shards, shape))
    return from_hf(name, lambda piece, index: hf[piece][index], shape)


def random_hf(shape: ModelShape) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    pieces = sorted(
        {piece for name in parameters(shape) for piece in map_parameter(name, shape).pieces}
    )
    return {name: torch.randn(size, generator=g) for name, size in pieces}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_of_all_ranks_rebuild_the_hf_tensors(family: Family, tp: int) -> None:
    shape = tiny_shape(family)
    hf = random_hf(shape)
    for name in parameters(shape):
        shards = [
            from_hf(name, lambda n, index: hf[n][index], shape, rank, tp) for rank in range(tp)
        ]
        assert {s.shape for s in shards} == {torch.Size(shard_shape(name, shape, tp))}
        cut = shards if map_parameter(name, shape).rule.split is not None else shards[:1]
        for hf_name, tensor in to_hf(name, cut, shape):
            assert torch.equal(tensor, hf[hf_name]), (name, hf_name)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_shard_and_unshard_are_inverse_for_any_shape(family: Family) -> None:
    shape = tiny_shape(family)
    hf = random_hf(shape)
    for name in parameters(shape):
        full = from_hf(name, lambda n, index: hf[n][index], shape)
        shards = [shard(name, full, shape, rank, 2) for rank in range(2)]
        for rank in range(2):
            assert torch.equal(
                shards[rank], from_hf(name, lambda n, index: hf[n][index], shape, rank, 2)
            )
        if map_parameter(name, shape).rule.split is not None:
            assert torch.equal(unshard(name, shards, shape), full)


def test_qkv_is_interleaved_per_group() -> None:
    shape = tiny_shape(FAMILIES[1])
    q, k, v = (torch.arange(n) + base for n, base in ((48, 0), (24, 1000), (24, 2000)))
    hf = {
        f"model.layers.0.self_attn.{n}_proj.bias": t for n, t in zip("qkv", (q, k, v), strict=True)
    }
    got = from_hf(
        "decoder.layers.0.self_attention.linear_qkv.bias", lambda n, index: hf[n][index], shape
    )
    # 2 query heads, key, value
    assert got[:24].tolist() == [
        *range(12),
        *range(1000, 1006),
        *range(2000, 2006),
    ]


def test_fc1_shard_holds_its_gate_and_up_rows() -> None:
    shape = tiny_shape(FAMILIES[0])
    full = torch.arange(48).reshape(48, 1).expand(48, 16)
    got = shard("decoder.layers.0.mlp.linear_fc1.weight", full, shape, 1, 2)
    assert got[:, 0].tolist() == [*range(12, 24), *range(36, 48)]


def test_padded_vocabulary_rows_are_zero_and_not_exported() -> None:
    shape = tiny_shape(FAMILIES[0], padded=64)
    hf = random_hf(shape)
    last = from_hf("output_layer.weight", lambda n, index: hf[n][index], shape, 3, 4)
    assert last.shape == (16, 16) and torch.equal(last[2:], torch.zeros(14, 16))
    beyond = from_hf(
        "output_layer.weight",
        lambda n, index: hf[n][index],
        tiny_shape(FAMILIES[0], padded=128),
        3,
        4,
    )
    assert torch.equal(beyond, torch.zeros(32, 16))


def test_tied_output_layer_reads_the_embedding() -> None:
    assert map_parameter("output_layer.weight", tiny_shape(FAMILIES[1], tied=True)).pieces == (
        ("model.embed_tokens.weight", (50, 16)),
    )


def write_config(folder: Path, **config: object) -> Path:
    base = {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 50,
    }
    (folder / "config.json").write_text(json.dumps(base | config))
    return folder


def test_unsupported_architecture_error_lists_supported_ones(tmp_path: Path) -> None:
    config = HfConfig(write_config(tmp_path, architectures=["MambaForCausalLM"]))
    with pytest.raises(DataError, match=r"model.path.*MambaForCausalLM.*Qwen3ForCausalLM"):
        _ = config.family


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("attention_bias", True),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_model_that_megatron_computes_differently_is_rejected(
    tmp_path: Path, key: str, value: object
) -> None:
    with pytest.raises(DataError, match=key):
        HfConfig(write_config(tmp_path, **{key: value})).architecture()


def test_rope_theta_is_read_from_either_field(tmp_path: Path) -> None:
    assert HfConfig(write_config(tmp_path, rope_theta=5e5)).architecture().rotary_base == 5e5
    new = HfConfig(
        write_config(tmp_path, rope_parameters={"rope_theta": 7e5, "rope_type": "default"})
    )
    assert new.architecture().rotary_base == 7e5
    with pytest.raises(DataError, match="yarn"):
        HfConfig(
            write_config(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0})
        ).architecture()


def test_vocabulary_is_padded_to_the_multiple(tmp_path: Path) -> None:
    shape = HfConfig(write_config(tmp_path)).shape(vocab_multiple=16)
    assert (shape.vocab_size, shape.padded_vocab_size, shape.kv_channels) == (50, 64, 2)


def test_incomplete_folder_error_names_the_tensor(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(DataError, match="safetensors"):
        SafetensorsFolder(tmp_path)
    save_file({"other": torch.zeros(4, 6)}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    with pytest.raises(DataError, match=r"no tensor model\.norm\.weight"):
        folder.tensor_shape("model.norm.weight")
    assert folder.tensor_shape("other") == (4, 6)
    assert folder.read("other", (slice(1, 3), slice(None))).shape == (2, 6)


@pytest.mark.parametrize("tied", [False, True])
def test_number_of_parameters_counts_padding_and_all_experts(tied: bool) -> None:
    """So does the check of the disk before a checkpoint."""
    attention = 16 * 8 * 6 * 2 + 16 * 4 * 6 * 2 + 2 * 6  # queries, output; keys, values; two norms
    layer = attention + 2 * 16 + 4 * 16 + 4 * 3 * 16 * 12  # norms, router, experts
    vocabulary = 52 * 16 * (1 if tied else 2)
    family = next(family for family in FAMILIES if family.name == "qwen3_moe")
    assert num_parameters(tiny_shape(family, tied)) == 2 * layer + 16 + vocabulary
