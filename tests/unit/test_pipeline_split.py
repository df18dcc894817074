"""The layers of pipeline stages: Megatron-Core builds those that plan and estimates count with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from model_shapes import DENSE_32B, plan_config

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model import layout, memory, weight_plan
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.layout import Layout
from megatron_async_rl.model.small_model import small_chunks, small_model
from megatron_async_rl.trainer import selftest
from megatron_async_rl.trainer.model import megatron_config

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
LAYOUT = "pipeline_model_parallel_layout"
EMBEDDING, LOSS = (f"account_for_{name}_in_pipeline_split" for name in ("embedding", "loss"))
SPLITS: list[tuple[int, int, int, dict[str, Any], list[int]]] = [
    # layers, stages, chunks of each, settings, layers of each chunk
    (61, 1, 1, {}, [61]),
    (64, 4, 2, {}, [8] * 8),
    (61, 4, 1, {}, [15, 15, 16, 15]),
    (61, 16, 1, {}, [3, 3, *[4] * 13, 3]),
    (7, 4, 1, {}, [2, 2, 2, 1]),
    (5, 2, 2, {}, [1, 1, 2, 1]),
    (61, 4, 1, {FIRST: 16}, [16, 15, 15, 15]),
    (61, 4, 1, {LAST: 13}, [16, 16, 16, 13]),
    (61, 16, 1, {FIRST: 3, LAST: 2}, [3, *[4] * 14, 2]),
    (5, 2, 1, {FIRST: 2, LAST: 3}, [2, 3]),
    (22, 3, 2, {FIRST: 8, LAST: 6}, [4, 4, 3] * 2),
    (30, 4, 2, {EMBEDDING: True, LOSS: True}, [3, *[4] * 6, 3]),
    (63, 4, 1, {EMBEDDING: True, LOSS: False}, [15, 16, 16, 16]),
    (61, 16, 1, {LAYOUT: "Et*3|(t*4|)*14,ttL"}, [3, *[4] * 14, 2]),
    (4, 2, 2, {LAYOUT: "E|tt|t|tL"}, [0, 2, 1, 1]),
    (3, 2, 1, {LAYOUT: [["embedding", "decoder"], ["decoder", "decoder", "loss"]]}, [1, 2]),
]


def split_config(
    folder: Path, layers: int, stages: int, chunks: int = 1, settings: dict[str, Any] | None = None
) -> Config:
    model = DENSE_32B | {"num_hidden_layers": layers}
    sizes = {"pipeline_model": stages, "virtual_pipeline_model": chunks}
    tree = msgspec.to_builtins(plan_config(folder, model, **sizes))
    tree["megatron"] |= settings or {}
    return configuration.from_tree(tree)


@pytest.fixture
def no_groups() -> Iterator[None]:
    yield
    mpu.set_pipeline_model_parallel_rank(None)
    mpu.set_virtual_pipeline_model_parallel_world_size(None)


@pytest.mark.parametrize("layers, stages, chunks, settings, sizes", SPLITS)
def test_stages_have_the_layers_that_megatron_builds(
    no_groups: None,
    tmp_path: Path,
    layers: int,
    stages: int,
    chunks: int,
    settings: dict[str, Any],
    sizes: list[int],
) -> None:
    config, hf = split_config(tmp_path, layers, stages, chunks, settings), HfConfig(tmp_path)
    chosen = Layout.from_config(config)
    assert list(chosen.chunk_layers(layers)) == sizes
    layout.check_trainer(chosen, hf.shape())
    made = megatron_config.transformer_config(config, hf.shape(), hf.architecture())
    mpu.set_virtual_pipeline_model_parallel_world_size(chunks if chunks > 1 else None)
    stage_of = {}
    for number, size in enumerate(sizes):
        stage, chunk = number % stages, number // stages if chunks > 1 else None
        mpu.set_pipeline_model_parallel_rank(stage)
        assert get_num_layers_to_build(made, chunk, stage) == size
        first = get_transformer_layer_offset(made, chunk, stage)
        stage_of |= dict.fromkeys(range(first, first + size), stage)
    assert [chosen.stage_of(layer, layers) for layer in range(layers)] == [
        stage_of[layer] for layer in range(layers)
    ]


@pytest.mark.parametrize(
    "layers, stages, chunks, settings, problem",
    [
        (4, 5, 1, {}, r"pipeline_model_parallel_size = 5 is more .*num_hidden_layers = 4"),
        (5, 2, 3, {}, r"= 2 times virtual_pipeline_model_parallel_size = 3 is more"),
        (4, 1, 1, {FIRST: 4}, rf"{FIRST} = 4 needs pipeline_model_parallel_size >= 2"),
        (4, 2, 1, {FIRST: "2"}, rf"{FIRST} = '2': expected an integer"),
        (4, 2, 1, {LAST: 0}, rf"{LAST} = 0: expected an integer"),
        (4, 2, 1, {LOSS: 1}, rf"{LOSS} = 1: expected true or false"),
        (4, 2, 1, {FIRST: 1, EMBEDDING: True}, r"exclude each other"),
        (4, 2, 1, {LAST: 1, LAYOUT: "Ett|ttL"}, r"exclude each other"),
        (61, 4, 1, {FIRST: 15}, rf"{FIRST} = 15 leaves 46 layers for 3 stages of equal size"),
        (5, 2, 1, {FIRST: 2, LAST: 2}, rf"{FIRST} = 2 and megatron.{LAST} = 2 leaves 1 layers"),
        (4, 3, 1, {LAST: 4}, rf"{LAST} = 4 leaves 0 layers"),
        (9, 3, 2, {FIRST: 4}, r"leaves 5 layers for 2 stages of 2 chunks"),
        (9, 2, 2, {LAST: 5}, rf"{LAST} = 5 is no multiple of virtual_pipeline"),
        (61, 4, 1, {EMBEDDING: True}, rf"{EMBEDDING} = true leaves 2 layers beyond 4 equal"),
        (5, 2, 1, {LAYOUT: "Ett|ttL"}, rf"{LAYOUT} has 4 decoder layers; .*layers = 5"),
        (4, 2, 2, {LAYOUT: "Ett|ttL"}, r"has 2 parts, but .* is 4"),
        (4, 2, 1, {LAYOUT: "Ett|tt"}, r"has other parts than"),
        (4, 2, 1, {LAYOUT: "Ett|tmtL"}, r"has other parts than"),
        (4, 3, 1, {LAYOUT: "|Ett|ttL"}, r"the embedding or the loss in other parts"),
        (4, 3, 1, {LAYOUT: "Ett||ttL"}, r"leaves stage 1 without a decoder layer"),
        (4, 2, 1, {LAYOUT: 3}, r"neither text nor a list of lists"),
    ],
)
def test_impossible_split_is_refused_with_the_reason(
    tmp_path: Path, layers: int, stages: int, chunks: int, settings: dict[str, Any], problem: str
) -> None:
    config = split_config(tmp_path, layers, stages, chunks, settings)
    with pytest.raises(ConfigError, match=problem):
        layout.check_trainer(Layout.from_config(config), HfConfig(tmp_path).shape())


def test_plan_and_memory_count_the_layers_of_each_stage(tmp_path: Path) -> None:
    plan = weight_plan.make(split_config(tmp_path, 13, 4, settings={FIRST: 1}), 50.0)
    tensors = 11  # of a layer: 4 norms, 4 of attention, 3 of the MLP
    counts = [sum(route.stage == stage for route in plan.routes) for stage in range(4)]
    assert counts == [tensors + 1, 4 * tensors, 4 * tensors, 4 * tensors + 2]
    hf = HfConfig(tmp_path)
    even, uneven = (
        memory.trainer_memory(split_config(tmp_path, 13, 4, settings=settings), hf)
        for settings in ({LAYOUT: "Et*3|t*3|t*4|t*3L"}, {LAYOUT: "Et*3|t*6|t*1|t*3L"})
    )
    layer = memory.layer_parameters(hf.shape())[0] * 2
    vocabulary = memory.vocabulary_parameters(hf.shape()) * 2
    assert even.weights == 3 * layer + vocabulary  # of an end: one has the activations, one logits
    assert uneven.weights == 6 * layer  # of a stage between them


def test_selftest_keeps_which_chunks_are_larger(tmp_path: Path) -> None:
    config = split_config(tmp_path, 61, 4)
    assert small_chunks(config) == (1, 1, 2, 1)
    assert small_model(config)["num_hidden_layers"] == 5
    yours, plain = selftest.variants(config, tmp_path).values()
    assert Layout.from_config(yours).chunk_layers(5) == (1, 1, 2, 1)
    assert plain.parallel_size("pipeline_model") == 1 and LAYOUT not in plain.megatron
    config = split_config(tmp_path, 22, 3, 2, {FIRST: 8, LAST: 6})
    assert small_chunks(config) == (2, 2, 1) * 2
    yours, _ = selftest.variants(config, tmp_path).values()
    assert FIRST not in yours.megatron
    assert small_chunks(split_config(tmp_path, 4, 2, 2, {LAYOUT: "E|tt|t|tL"})) == (0, 2, 1, 1)
    assert small_chunks(split_config(tmp_path, 64, 4, 2)) == (1,) * 8
    assert small_chunks(split_config(tmp_path, 64, 1)) == (2,)
