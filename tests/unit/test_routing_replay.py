"""Routing replay: from the engine's reply to the choice of the trainer's router."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

from config_builders import config_tree
from core_builders import core_settings, make_partial, prompt_stream
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from model_shapes import DENSE_32B, MOE_235B
from msgspec.structs import replace

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.tokens import token_fault
from megatron_async_rl.errors import ConfigError, DataError, EngineError
from megatron_async_rl.model.routing import Routing, replayed_routing
from megatron_async_rl.protocol.types import Partial, Sample, Segment, TrainSample
from megatron_async_rl.rollout.engine_client import RequestOutput, Sampling
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.generation import Generator
from megatron_async_rl.rollout.samples.routing import CallExperts, SampleExperts
from megatron_async_rl.trainer.data.microbatch import Packing, pack
from megatron_async_rl.trainer.model.routing import RouterReplay, RoutingReplay

ROUTING = Routing(num_layers=3, top_k=2, num_experts=200)
WIDTH = ROUTING.width


def chosen(positions: range, version: int) -> np.ndarray:
    """Returns the experts [positions, WIDTH] that the fake engine chooses under a version."""
    base = np.asarray(positions)[:, None] * WIDTH + np.arange(WIDTH)
    return (base + 7 * version) % ROUTING.num_experts


class Engine:
    """Answers like EngineClient.generate; `lengths`: tokens of each reply, all but the last of
    which a weight update interrupts. None: aborted in the queue, with one token and no experts."""

    def __init__(self, *lengths: int | None) -> None:
        self.lengths = list(lengths)
        self.version = 0
        self.asked: list[tuple[int, int]] = []  # tokens of the input, first position asked for

    async def generate(
        self, ids: list[int], sampling: Sampling, cache_key: str | None, experts_from: int
    ) -> RequestOutput:
        length = self.lengths.pop(0)
        count = 1 if length is None else length
        self.asked.append((len(ids), experts_from))
        segment = Segment(self.version, [len(ids) + n for n in range(count)], [-1.0] * count)
        positions = range(experts_from, len(ids) + count - 1)
        experts = None if length is None else chosen(positions, self.version).reshape(-1)
        self.version += 1
        return RequestOutput(
            [segment] if count else [], "abort" if self.lengths else "stop", experts=experts
        )


def generate(engine: Engine, ids: list[int], experts: CallExperts, **options: Any) -> list[int]:
    generator = Generator(engine, Gate(), lambda: None, 100, 1000, lambda ids: "")  # type: ignore[arg-type]
    generator._gate.open()
    sampling = Sampling(50, 1.0, [])
    done = asyncio.run(generator.generate(ids, sampling, experts=experts, **options))
    return [*ids, *done.ids]


def test_token_keeps_the_experts_of_the_pass_that_sampled_it() -> None:
    """Also where it is prefilled again, under the weights of a later version."""
    engine, experts = Engine(3, 0, 2), CallExperts(ROUTING)
    tokens = generate(engine, [1, 2, 3, 4], experts)
    assert len(tokens) == 9 and engine.asked == [(4, 0), (7, 6), (7, 6)]
    beside = experts.of_tokens(9).reshape(9, WIDTH)
    assert not beside[0].any()
    assert np.array_equal(beside[1:7], chosen(range(6), 0))
    assert np.array_equal(beside[7:9], chosen(range(6, 8), 2))
    assert beside.dtype == np.uint8


def test_request_aborted_in_the_queue_leaves_its_experts_to_the_next_one() -> None:
    engine, experts = Engine(2, None, 2), CallExperts(ROUTING)
    tokens = generate(engine, [1, 2, 3], experts)
    assert engine.asked == [(3, 0), (5, 4), (6, 4)]
    beside = experts.of_tokens(len(tokens)).reshape(-1, WIDTH)
    assert np.array_equal(beside[1:5], chosen(range(4), 0))
    assert np.array_equal(beside[5:], chosen(range(4, 7), 2))


def test_resumed_sample_continues_the_experts_of_its_partial() -> None:
    engine, before = Engine(3), CallExperts(ROUTING)
    tokens = generate(engine, [1, 2], before)
    arrays = (np.zeros(5, np.float32), np.array([-1, -1, 0, 0, 0], np.int32))
    stored = Partial(np.asarray(tokens, np.int32), *arrays, before.of_tokens(5))
    calls = SampleExperts(ROUTING)
    experts = calls.begin([1, 2], stored)
    engine.lengths = [2]
    tokens = generate(engine, [1, 2], experts, resumed=stored.segments())
    assert engine.asked[-1] == (5, 4)
    calls.end(tokens, experts)
    sample = calls.added_to(make_sample(tokens))
    beside = sample.experts.reshape(-1, WIDTH)
    assert np.array_equal(beside[1:5], chosen(range(4), 0))
    assert np.array_equal(beside[5:], chosen(range(4, 6), 1))


def test_calls_that_a_later_one_continues_are_not_kept() -> None:
    """An episode of many turns holds the experts of its branches, not those of every call."""
    engine, calls, tokens = Engine(2), SampleExperts(ROUTING), [1, 2]
    for _ in range(4):
        experts = calls.begin(tokens, None)
        engine.lengths = [2]
        tokens = generate(engine, tokens, experts)
        calls.end(tokens, experts)
        tokens = [*tokens, 500]
    other = calls.begin([1, 2, 600], None)
    engine.lengths = [2]
    branch = generate(engine, [1, 2, 600], other)
    calls.end(branch, other)
    assert [len(ids) for ids, _ in calls._calls] == [len(tokens) - 1, len(branch)]
    sample = calls.added_to(make_sample([*tokens[:-1], *branch], [0, len(tokens) - 1]))
    beside = sample.experts.reshape(-1, WIDTH)
    for turn in range(4):  # the first tokens of turn n are in version n
        start = 3 * turn + 2
        assert np.array_equal(beside[start], chosen(range(start - 1, start), turn)[0])


def make_sample(ids: list[int], starts: list[int] | None = None) -> Sample:
    zeros = np.zeros(len(ids), np.float32)
    versions = np.zeros(len(ids), np.int32)
    return Sample(np.asarray(ids, np.int32), zeros, versions, "stop", "", starts=starts or [])


def test_later_turn_asks_only_for_the_experts_behind_the_earlier_one() -> None:
    engine, calls = Engine(2), SampleExperts(ROUTING)
    first = generate(engine, [1, 2, 3], experts := calls.begin([1, 2, 3], None))
    calls.end(first, experts)
    second = [*first, 90, 91]  # a tool's output
    engine.lengths = [2]
    last = generate(engine, second, experts := calls.begin(second, None))
    calls.end(last, experts)
    assert engine.asked == [(3, 0), (7, 4)]
    beside = calls.added_to(make_sample([*last, 92])).experts.reshape(-1, WIDTH)
    assert np.array_equal(beside[1:5], chosen(range(4), 0))
    assert np.array_equal(beside[5:9], chosen(range(4, 8), 1))
    assert not beside[9].any()  # after the last turn nothing was computed


def test_each_branch_has_the_experts_of_its_own_calls() -> None:
    engine, calls = Engine(2), SampleExperts(ROUTING)
    branches = []
    for ids in ([1, 2, 3], [1, 2, 50]):
        engine.lengths = [2]
        branches.append(generate(engine, ids, experts := calls.begin(ids, None)))
        calls.end(branches[-1], experts)
    assert engine.asked == [(3, 0), (3, 2)]
    sample = calls.added_to(make_sample([*branches[0], *branches[1]], [0, 5]))
    beside = sample.experts.reshape(2, 5, WIDTH)
    assert not beside[:, 0].any()
    assert np.array_equal(beside[0, 1:], chosen(range(4), 0))
    assert np.array_equal(beside[1, 1:3], chosen(range(2), 0))  # shared context
    assert np.array_equal(beside[1, 3:], chosen(range(2, 4), 1))


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (np.zeros(WIDTH, np.int32), "6 experts, needed are 12"),
        (np.zeros(2 * WIDTH + 1, np.int32), "13 experts"),
        (np.full(2 * WIDTH, 200, np.int32), "experts 200 to 200, the model has 200"),
        (np.full(2 * WIDTH, -1, np.int32), "experts -1"),
    ],
)
def test_experts_that_do_not_fit_the_model_are_refused(returned: np.ndarray, problem: str) -> None:
    with pytest.raises(EngineError, match=problem):
        CallExperts(ROUTING).add(returned, 3)


@pytest.mark.parametrize(
    ("experts", "fault"),
    [
        (np.full(5 * WIDTH, 199, np.uint8), ""),
        (np.empty(0, np.uint8), ""),
        (np.full(5 * WIDTH, 200, np.uint8), "expert 200 of 200"),
        (np.zeros(5 * WIDTH - 1, np.uint8), "29 experts"),
        (np.zeros(5 * WIDTH, np.uint16), "30 experts of uint16, not 6 of uint8"),
    ],
)
def test_experts_are_checked_before_they_are_recorded(experts: np.ndarray, fault: str) -> None:
    partial, prompt = replace(make_partial(0, 0), experts=experts), prompt_stream()()
    settings = core_settings(routing=ROUTING)
    assert token_fault(partial, prompt, 0, 0, settings).startswith(fault)
    assert bool(token_fault(partial, prompt, 0, 0, settings)) == bool(fault)
    unset = token_fault(partial, prompt, 0, 0, core_settings())
    assert ("rollout.routing_replay is not set" in unset) == bool(len(experts))


def routed(length: int, seed: int) -> TrainSample:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 50, length).astype(np.int32)
    experts = rng.integers(1, 200, length * WIDTH).astype(np.uint8)
    zeros = np.zeros(length, np.float32)
    return TrainSample(ids, zeros, np.zeros(length, np.int32), zeros, experts=experts)


def test_packed_position_has_the_experts_that_sampled_the_next_token() -> None:
    samples = [routed(5, 0), replace(routed(3, 1), experts=np.empty(0, np.uint8)), routed(4, 2)]
    packing = partial(Packing, budget=64, tp=2, device=torch.device("cpu"), thd=False, dense=True)
    whole = pack(samples, 0, packing(routing=ROUTING)).experts_TLK
    assert whole is not None and whole.shape == (12, 3, 2) and whole.dtype == torch.uint8
    rows = whole.view(12, WIDTH).numpy()
    assert np.array_equal(rows[:4], samples[0].experts.reshape(5, WIDTH)[1:])
    assert not rows[4:8].any()  # a last token, and a sample without experts
    assert np.array_equal(rows[8:11], samples[2].experts.reshape(4, WIDTH)[1:])
    for rank in range(2):
        split = pack(samples, 0, packing(routing=ROUTING, cp=2, cp_rank=rank))
        positions = split.sequences.shard_index_T
        assert positions is not None and split.experts_TLK is not None
        joined = pack(samples, 0, packing(routing=ROUTING, cp=2, cp_rank=0))
        assert len(split.experts_TLK) == len(positions) == len(joined.ids_T)
        lengths = [8, 4, 4]  # multiples of 2 cp
        padded = np.zeros((16, WIDTH), np.uint8)
        for start, sample in zip(np.cumsum([0, *lengths]), samples, strict=False):
            if len(sample.experts):
                own = sample.experts.reshape(-1, WIDTH)[1:]
                padded[start : start + len(own)] = own
        assert np.array_equal(split.experts_TLK.view(-1, WIDTH).numpy(), padded[positions])


@pytest.mark.parametrize("routing", [Routing(3, 2, 100), Routing(4, 2, 200)])
def test_batch_of_another_model_is_refused(routing: Routing) -> None:
    sample = replace(routed(4, 0), experts=np.full(4 * WIDTH, 150, np.uint8))
    packing = Packing(
        budget=64, tp=1, device=torch.device("cpu"), thd=False, dense=True, routing=routing
    )
    with pytest.raises(DataError, match="experts of another model"):
        pack([sample], 0, packing)


ROUTERS: list[dict[str, Any]] = [
    {"use_pre_softmax": False},
    {"use_pre_softmax": True},
    {"score_function": "sigmoid", "expert_bias": torch.linspace(-0.3, 0.3, 8)},
    {"num_groups": 4, "group_topk": 2, "scaling_factor": 2.5},
]


def route(logits: Tensor, replay: RouterReplay | None, **router: Any) -> tuple[Tensor, Tensor]:
    return topk_routing_with_score_function(logits, 2, router_replay=replay, **router)  # type: ignore[arg-type]


@pytest.mark.parametrize("router", ROUTERS)
def test_replay_of_the_routers_own_choice_changes_no_bit(router: dict[str, Any]) -> None:
    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    replay, gradients = RouterReplay(), []
    own_probs, own_map = route(logits, None, **router)
    replay.experts_TK = own_probs.topk(2).indices.to(torch.uint8)
    for which in (None, replay):
        leaf = logits.clone().requires_grad_()
        probs, chosen_map = route(leaf, which, **router)
        assert torch.equal(probs, own_probs) and torch.equal(chosen_map, own_map)
        probs.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_replayed_experts_get_their_weights_from_the_trainers_scores() -> None:
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    replay = RouterReplay()
    replay.experts_TK = torch.tensor([[0, 7], [5, 1], [3, 3], [0, 0]], dtype=torch.uint8)
    probs, chosen_map = route(logits, replay)
    assert chosen_map[:2].nonzero().tolist() == [[0, 0], [0, 7], [1, 1], [1, 5]]
    assert torch.allclose(probs[0, [0, 7]], logits[0, [0, 7]].softmax(0))
    assert torch.equal(chosen_map[2:], route(logits, None)[1][2:])  # one expert twice: no choice
    probs[0, 0].backward()
    assert logits.grad is not None and logits.grad[0, [0, 7]].abs().min() > 0
    assert logits.grad[0, 1:7].abs().max() == 0


def test_recomputation_repeats_the_experts_of_its_own_forward_pass() -> None:
    """A pipeline runs several forward passes before the first backward."""
    replay, outputs, maps = RouterReplay(), [], []
    replay.has_backward = True
    leaf = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def layer(logits: Tensor) -> Tensor:
        probs, chosen_map = route(logits, replay)
        maps.append(chosen_map)
        return probs * 2

    for first in (0, 3):
        replay.experts_TK = torch.tensor([[first, first + 1]] * 4, dtype=torch.uint8)
        outputs.append(checkpoint(layer, leaf, use_reentrant=True))
        replay.experts_TK = None
    for output in outputs:
        output.sum().backward()
    assert len(maps) == 4 and not replay.recomputed
    assert torch.equal(maps[2], maps[0]) and torch.equal(maps[3], maps[1])
    assert not torch.equal(maps[0], maps[1])


def replaying(folder: Path, model: dict[str, Any], **changes: Any) -> Config:
    (folder / "config.json").write_text(json.dumps(model))
    settings = {"model.path": str(folder), "rollout.routing_replay": True} | changes
    return configuration.from_tree(config_tree(**settings))


def test_pipeline_stage_without_experts_replays_nothing() -> None:
    replay = RoutingReplay([torch.nn.Linear(2, 2)], ROUTING)
    with replay.of(torch.zeros(5, ROUTING.num_layers, ROUTING.top_k, dtype=torch.long)):
        pass


def test_published_models_take_a_byte_per_layer_and_expert(tmp_path: Path) -> None:
    found = replayed_routing(replaying(tmp_path, MOE_235B | {"num_experts_per_tok": 8}))
    assert found == Routing(94, 8, 128) and found.width * found.dtype.itemsize == 752
    assert Routing(61, 8, 384).dtype == np.uint16


def test_number_of_experts_is_read_as_transformers_5_writes_it(tmp_path: Path) -> None:
    written = MOE_235B | {"num_experts_per_tok": 8, "num_local_experts": 64}
    del written["num_experts"]
    found = replayed_routing(replaying(tmp_path, written))
    assert found and found.num_experts == 64


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (DENSE_32B, "Qwen3ForCausalLM\\) has no experts"),
        (MOE_235B | {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
    ],
)
def test_model_without_a_choice_is_refused_by_name(
    tmp_path: Path, model: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=f"rollout.routing_replay = true.*{problem}"):
        replayed_routing(replaying(tmp_path, model))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("megatron.moe_router_fusion", True),
        ("megatron.moe_router_load_balancing_type", "sinkhorn"),
        ("sglang.enable_return_routed_experts", True),
    ],
)
def test_settings_that_exclude_replay_are_refused_by_name(
    tmp_path: Path, key: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=key):
        replaying(tmp_path, MOE_235B, **{key: value})
