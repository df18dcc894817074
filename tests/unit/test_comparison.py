"""`compare-logprobs`: which operation is the first that differs, and the engine's dump."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from config_builders import trainer_config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_async_rl.cli import compare_logprobs
from megatron_async_rl.errors import EngineError
from megatron_async_rl.trainer.comparison.difference import Comparison
from megatron_async_rl.trainer.comparison.engine_dump import read_passes
from megatron_async_rl.trainer.comparison.operations import (
    EMBEDDING,
    FINAL_NORM,
    LAYER,
    LOOK_AT,
    ROUTER,
    ROUTER_BIAS,
    layer_operation,
)

LAYERS, TOKENS, COLUMNS = 3, 7, 8
ORDER = [
    EMBEDDING,
    *(layer_operation(layer, operation.name) for layer in range(LAYERS) for operation in LAYER),
    FINAL_NORM,
]


def outputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(TOKENS, COLUMNS, generator=generator) for name in ORDER}


def comparison(dtype: torch.dtype = torch.bfloat16) -> Comparison:
    return Comparison(LAYERS, torch.finfo(dtype).eps, num_experts_chosen=2)


@given(first=st.integers(0, len(ORDER) - 1), later=st.integers(0, 3))
def test_first_operation_that_differs_is_found(first: int, later: int) -> None:
    engine, trainer = outputs(), outputs()
    for name in ORDER[first : first + 1 + later]:
        trainer[name] = trainer[name] * 2
    compared = comparison()
    compared.add(engine, trainer, TOKENS)
    assert compared.first_beyond_rounding() == ORDER[first]
    assert ORDER[first].split(": ")[-1] in LOOK_AT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_to_the_type_is_no_difference(dtype: torch.dtype) -> None:
    engine = {name: tensor.to(dtype) for name, tensor in outputs().items()}
    compared = comparison(dtype)
    compared.add(engine, outputs(), TOKENS)
    assert compared.first_beyond_rounding() is None
    noisy = {n: t * (1 + 20 * torch.finfo(dtype).eps) for n, t in outputs().items()}
    if dtype != torch.float32:  # in float32 the bound is of sums, not of single roundings
        compared.add(engine, noisy, TOKENS)
        assert compared.first_beyond_rounding() == EMBEDDING


def test_infinity_and_nan_differ() -> None:
    for value in (float("nan"), float("inf")):
        trainer = outputs()
        trainer[FINAL_NORM][1, 1] = value
        compared = comparison()
        compared.add(outputs(), trainer, TOKENS)
        assert compared.first_beyond_rounding() == FINAL_NORM
        assert compared.differences[FINAL_NORM].largest == float("inf")


def test_padding_and_missing_operations_are_left_out() -> None:
    trainer = {n: torch.cat([t, torch.ones(1, COLUMNS)]) for n, t in outputs().items()}
    engine = outputs()
    del engine[EMBEDDING]
    compared = comparison()
    compared.add(engine, trainer, TOKENS)
    assert compared.first_beyond_rounding() is None
    assert EMBEDDING not in compared.differences


def test_tokens_with_other_experts_are_counted() -> None:
    router = layer_operation(1, "router")
    engine = {router: torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 4)}
    trainer = {router: engine[router].clone()}
    trainer[router][0] = torch.tensor([2.0, 3.0, 1.0, 0.0])  # the same two
    trainer[router][1] = torch.tensor([3.0, 1.0, 2.0, 0.0])
    compared = comparison()
    compared.add(engine, trainer, 4)
    assert compared.other_experts == {1: [0.25]}
    assert "25.00%" in "\n".join(compared.table())


def test_experts_are_those_that_a_bias_in_the_router_chooses() -> None:
    router, bias = layer_operation(1, ROUTER), layer_operation(1, ROUTER_BIAS)
    engine = {router: torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 4)}
    trainer = {router: engine[router].clone(), bias: torch.tensor([0.0, 0.0, 0.0, 5.0])}
    trainer[router][:2] = torch.tensor([3.0, 1.0, 2.0, 0.0])  # 3 and 0, as in the engine
    trainer[router][2] = torch.tensor([2.0, 3.0, 1.0, 0.0])  # 3 and 1
    compared = comparison()
    compared.add(engine, trainer, 4)
    assert compared.other_experts == {1: [0.25]}


def test_trainer_without_context_parallelism_keeps_the_rule_for_batches() -> None:
    config = trainer_config(context_parallel_size=32)  # 16 samples per step
    whole = compare_logprobs._trainer_config(config)
    assert whole.trainer_ranks == config.trainer_ranks == 32
    assert whole.trainer.data_parallel_size == 32


def write_pass(folder: Path, name: str, ids: list[int]) -> None:
    rank = folder / name
    rank.mkdir(parents=True, exist_ok=True)
    length = len(ids)
    tensors = {
        "model.forward_batch_info.input_ids": torch.tensor(ids),
        "model.embed_tokens": torch.full((length, 4), 1.0),
        "model.layers.0.input_layernorm": torch.full((length, 4), 2.0),
        "model.layers.0.self_attn.qkv_proj": torch.full((length, 12), 3.0),
        "model.layers.0.post_attention_layernorm": [torch.zeros(length, 4), torch.ones(length, 4)],
        "model.norm": [torch.full((length, 4), 4.0), torch.zeros(length, 4)],
    }
    torch.save(tensors, rank / f"Pass{len(list(rank.iterdir())):05d}.pt")


def test_dump_is_read_by_the_ids_of_its_passes(tmp_path: Path) -> None:
    for ids in ([1], [5, 6, 7], [1, 2]):
        write_pass(tmp_path, "TP0_PP0_Rank0_pid7", ids)
    first, second = read_passes(tmp_path, [[1, 2], [5, 6, 7]])
    assert len(second[EMBEDDING]) == 3
    # layer 0 has no sum before it, so its norm returns nothing else
    assert set(first) == {EMBEDDING, "layer 0: qkv", "layer 0: residual", FINAL_NORM}
    assert first["layer 0: residual"].unique().tolist() == [1.0]
    with pytest.raises(EngineError, match=r"1 of 2 prefills .*chunked_prefill_size"):
        read_passes(tmp_path, [[1, 2], [9]])


def test_parallel_engine_shows_only_what_every_rank_has(tmp_path: Path) -> None:
    for rank in ("TP0_PP0_Rank0_pid7", "TP1_PP0_Rank1_pid8"):
        write_pass(tmp_path, rank, [1, 2])
    [found] = read_passes(tmp_path, [[1, 2]])
    assert set(found) == {EMBEDDING, "layer 0: residual", FINAL_NORM}
