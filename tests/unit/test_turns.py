"""Rewards per turn: their way to the batch, and the estimators of turns against their formulas."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from agent_endpoint import serving
from aiohttp import ClientSession
from char_tokenizer import make_chat_folder
from config_builders import algorithm_config, config_tree
from core_builders import (
    core_settings,
    join_workers,
    make_core,
    make_sample,
    messages_of,
    prompt_stream,
    restart_core,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.controller.advantage import BATCH_EPS, GROUP_EPS, sample_advantages
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.scoring import credited
from megatron_async_rl.controller.delivery import training_batch
from megatron_async_rl.controller.journal.events import SampleScored
from megatron_async_rl.controller.journal.journal import Journal
from megatron_async_rl.controller.tokens import token_fault
from megatron_async_rl.controller.turns import Turns, rewards_at_ends, shaped_turns, turns_of
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import ConfigError, HookFailed
from megatron_async_rl.observability.sample_log import TrainedGroup, sample_line
from megatron_async_rl.protocol.messages import Generated, ScoreRequest, ScoreResult
from megatron_async_rl.protocol.types import NOT_GENERATED, Sample, Segment, turn_texts
from megatron_async_rl.rollout.agents.transcript import TurnRewards, checked_rewards
from megatron_async_rl.rollout.workflow import Completion, Episode

FLOATS = st.floats(-4, 4, width=32)
BATCHES = st.integers(1, 4).flatmap(
    lambda size: st.lists(
        st.lists(st.lists(FLOATS, min_size=1, max_size=4), min_size=size, max_size=size),
        min_size=1,
        max_size=3,
    )
)
"""Rewards of turns, by group and sample."""


def algorithm(**chosen: Any) -> AlgorithmConfig:
    return algorithm_config(**({"prompts_per_step": 1, "samples_per_prompt": 2} | chosen))


def as_turns(rewards: list[list[list[float]]]) -> list[list[Turns]]:
    """Returns turns of 1, 2, 3, ... tokens, one after another."""
    return [
        [
            Turns(
                np.array(turns, np.float64),
                np.cumsum([0, *range(1, len(turns))]),
                np.arange(1, len(turns) + 1),
            )
            for turns in group
        ]
        for group in rewards
    ]


def estimated(rewards: list[list[list[float]]], c: AlgorithmConfig) -> list[list[list[float]]]:
    """Returns the advantage of each turn; all tokens of a turn must have the same."""
    turns_GS = as_turns(rewards)
    sums = [[math.fsum(turns) for turns in group] for group in rewards]
    tokens = [[int(turns.lengths.sum()) for turns in group] for group in turns_GS]
    got = sample_advantages(np.array(sums), np.array(tokens), c, turns_GS=turns_GS)
    for row, group in zip(got, turns_GS, strict=True):
        for a_N, turns in zip(row, group, strict=True):
            assert a_N.dtype == np.float64
            assert np.array_equal(a_N, np.repeat(a_N[turns.starts], turns.lengths))
    return [
        [a_N[turns.starts].tolist() for a_N, turns in zip(row, group, strict=True)]
        for row, group in zip(got, turns_GS, strict=True)
    ]


def by_the_formula(rewards: list[list[list[float]]], c: AlgorithmConfig) -> list[list[list[float]]]:
    """Computes shaping, discounted rewards to go and the comparison, one turn after another."""
    out = []
    for group in rewards:
        returns = []
        for turns in group:
            whole = ((sum(turns) - 0.5) * 2 - c.reward_shaping.bias) * c.reward_shaping.scale
            if c.reward_shaping.clip is not None:
                whole = max(-c.reward_shaping.clip, min(c.reward_shaping.clip, whole))
            s = [2 * c.reward_shaping.scale * r for r in turns[:-1]]
            s.append(whole - sum(s))
            returns.append(
                [
                    sum(c.advantage.gamma ** (later - k) * s[later] for later in range(k, len(s)))
                    for k in range(len(s))
                ]
            )
        rows = []
        for own in returns:
            row = []
            for k, value in enumerate(own):
                compared = [other[k] for other in returns if len(other) > k]
                mean = sum(compared) / len(compared)
                std = math.sqrt(sum((x - mean) ** 2 for x in compared) / len(compared))
                row.append((value - mean) / (std + GROUP_EPS))
            rows.append(row if c.advantage.group_normalize else own)
        out.append(rows)
    if c.advantage.batch_normalize:
        each = [a for group in out for row in group for n, a in enumerate(row, 1) for _ in range(n)]
        mean = sum(each) / len(each)
        std = math.sqrt(sum((a - mean) ** 2 for a in each) / len(each))
        out = [[[(a - mean) / (std + BATCH_EPS) for a in row] for row in group] for group in out]
    return out


def flat(nested: list[list[list[float]]]) -> list[float]:
    return [value for group in nested for row in group for value in row]


# ---- turn_grpo


@given(
    BATCHES,
    st.sampled_from([1.0, 0.9, 0.5, 0.0]),
    st.sampled_from(
        [
            {},
            {"group_normalize": False},
            {"batch_normalize": True, "group_normalize": False},
            {"reward_scale": 3.0, "reward_bias": 0.2, "reward_clip": 2.0, "group_normalize": False},
        ]
    ),
)
@settings(max_examples=80, deadline=None)
def test_turn_grpo_matches_the_formula(
    rewards: list[list[list[float]]], gamma: float, extra: dict[str, Any]
) -> None:
    c = algorithm(advantage="turn_grpo", gamma=gamma, **extra)
    got, want = flat(estimated(rewards, c)), flat(by_the_formula(rewards, c))
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8)


@given(
    st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from([1.0, 0.5, 0.0]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_one_turn_gives_exactly_grpo(
    rewards: list[list[float]], gamma: float, group_normalize: bool
) -> None:
    changes = {"gamma": gamma, "group_normalize": group_normalize}
    got = estimated(
        [[[r] for r in group] for group in rewards], algorithm(advantage="turn_grpo", **changes)
    )
    tokens = np.ones((len(rewards), 3), int)
    want = sample_advantages(np.array(rewards), tokens, algorithm(advantage="grpo", **changes))
    assert flat(got) == want.ravel().tolist()


def test_final_reward_without_discount_gives_grpo_at_every_turn() -> None:
    c = algorithm(advantage="turn_grpo")
    got = estimated([[[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.25]]], c)
    want = sample_advantages([[1.0, 0.0, 0.25]], np.ones((1, 3), int), algorithm(advantage="grpo"))
    assert got == [[[a] * 3 for a in want[0]]]


def test_discount_of_zero_compares_each_turn_alone() -> None:
    c = algorithm(advantage="turn_grpo", gamma=0.0)
    got = estimated([[[1.0, 0.0], [0.0, 1.0]]], c)
    np.testing.assert_allclose(got, [[[1, -1], [-1, 1]]], rtol=1e-5)
    [[[_, alone], [_]]] = estimated([[[1.0, 0.0], [0.0]]], c)
    assert alone == 0.0  # no other sample has a second turn


def test_discount_credits_earlier_turns_less() -> None:
    c = algorithm(advantage="turn_grpo", gamma=0.5, group_normalize=False)
    got = estimated([[[0.0, 0.0, 1.0], [0.5, 0.25, 0.75]]], c)
    assert got == [[[0.25, 0.5, 1.0], [1.375, 0.75, 0.5]]]  # of 0, 0, 1 and 1, 0.5, 0.5


@given(st.lists(FLOATS, min_size=1, max_size=5), FLOATS)
@settings(max_examples=40, deadline=None)
def test_shaped_rewards_of_turns_add_up_to_that_of_the_sample(
    rewards: list[float], shaped: float
) -> None:
    [[turns]] = shaped_turns(as_turns([[rewards]]), np.array([[shaped]]), 2.0)
    assert turns.rewards.sum() == pytest.approx(shaped, abs=1e-12)
    assert turns.rewards[:-1].tolist() == [2 * r for r in rewards[:-1]]


# ---- a critic's rewards


def branched(turn_rewards: list[float] = [], **fields: Any) -> Sample:  # noqa: B006
    """Returns a sample of two sequences; its four turns were called alternately.

    The places are 1 1 1 1 2 2 2 2 2 (sequence), - 0 0 2 - 1 - 3 3 (turn): turn 2 continues turn 0
    without context between them.
    """
    versions = np.array([NOT_GENERATED, 0, 0, 0, NOT_GENERATED, 0, NOT_GENERATED, 0, 0], np.int32)
    given: dict[str, Any] = {
        "ids": np.arange(9, dtype=np.int32),
        "logprobs": np.zeros(9, np.float32),
        "versions": versions,
        "stop": "stop",
        "text": "a\n\nb\n\ncc\n\n",
        "starts": [0, 4],
        "turn_starts": [1, 5, 3, 7],
        "turn_rewards": turn_rewards,
        "text_ends": [1, 4, 8, 10],
    }
    return Sample(**(given | fields))


def test_turns_are_the_calls_in_their_order() -> None:
    assert branched().turns() == [[1, 3], [5, 6], [3, 4], [7, 9]]
    assert branched(turn_starts=[]).turns() == [[1, 4], [5, 6], [7, 9]]
    assert turn_texts(branched().text, branched().text_ends) == ["a", "b", "cc", ""]
    assert turn_texts("a\n\nb", []) == ["a\n\nb"]


def test_advantages_of_turns_reach_their_tokens() -> None:
    turns = turns_of(branched(), 8.0, [1.0, 2.0, 4.0, 1.0])
    assert turns.per_token(np.array([10.0, 20.0, 30.0, 40.0])).tolist() == [
        10, 10, 30, 20, 40, 40,
    ]  # fmt: skip
    assert turns_of(branched(), 8.0).rewards.tolist() == [0, 0, 0, 8]


def test_critic_gets_rewards_at_the_ends_of_turns() -> None:
    """Rewards of other sequences count at the turn before them."""
    sample = branched()
    turns = turns_of(sample, 15.0, [1.0, 2.0, 4.0, 8.0])
    assert rewards_at_ends(sample, turns).tolist() == [0, 1 + 2, 4 + 8, 2 + 4, 0, 8]
    assert rewards_at_ends(sample, turns_of(sample, 5.0)).tolist() == [0, 0, 5, 0, 0, 5]
    single = make_sample(0, 0, 0)
    assert rewards_at_ends(single, turns_of(single, 5.0)).tolist() == [0, 0, 5]


# ---- the way of the rewards


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({}, ""),
        ({"turn_rewards": [1.0, -2.0, 0.0, 3.0], "reward": 0.5}, ""),
        ({"turn_rewards": [1.0]}, "1 rewards for 4 turns"),
        ({"turn_starts": [], "text_ends": [], "turn_rewards": [1.0] * 4}, "4 rewards for 3 turns"),
        ({"turn_rewards": [1.0, math.nan, 0.0, 0.0]}, "a reward of nan"),
        ({"turn_rewards": [1.0, math.inf, 0.0, 0.0]}, "a reward of inf"),
        ({"turn_rewards": [1e9, 1e9, 0.0, 0.0]}, "a reward of 2e+09"),
        ({"turn_rewards": [1e9, 0.0, 0.0, 0.0], "reward": 1.0}, "a reward of 1e+09"),
        ({"reward": math.nan}, "a reward of nan"),
        ({"turn_starts": [1, 5, 3, 4]}, "turns at [1, 5, 3]..."),  # context
        ({"turn_starts": [1, 5, 3, 3]}, "turns at"),
        ({"turn_starts": [1, 5, 3, -2]}, "turns at"),
        ({"turn_starts": [1, 5, 3]}, "turns at"),  # a run without a start
        ({"turn_starts": [1, 5, 3, 1 << 40]}, "turns at"),
        ({"text_ends": [1, 4, 8]}, "texts that end at [1, 4, 8]... for 4 turns"),
        ({"text_ends": [1, 4, 8, 9]}, "texts that end at"),
        ({"text_ends": [1, 1, 8, 10]}, "texts that end at"),
        ({"text_ends": [-1, 4, 8, 10]}, "texts that end at"),
    ],
)
def test_rewards_and_turns_of_a_sample_are_checked(fields: dict[str, Any], fault: str) -> None:
    settings = core_settings(single_turn=False, max_sequences=64)
    found = token_fault(branched(**fields), prompt_stream()(), 0, 0, settings)
    assert found.startswith(fault) and bool(found) == bool(fault)


def test_single_turn_is_scored_by_the_reward_function_only() -> None:
    for fields in ({"reward": 1.0}, {"turn_rewards": [1.0]}):
        sample = msgspec.structs.replace(make_sample(0), **fields)
        fault = token_fault(sample, prompt_stream()(), 0, 0, core_settings())
        assert "rollout.workflow = single_turn" in fault


def scored_core(sample: Sample, **result: Any) -> Core:
    """Returns a core after the first sample of a group has been generated and scored."""
    core = make_core(single_turn=False, max_sequences=64)
    lease, *_ = join_workers(core)
    actions = core.handle(inputs.Received("rollout-0", Generated(lease.key(0), sample)), 0)
    for request in messages_of(actions, ScoreRequest):
        assert request.text_ends == sample.text_ends
        result = {"reward": 1.0} | result
        core.handle(inputs.Received("reward-0", ScoreResult(request.key, **result)), 0)
    return core


def test_reward_is_the_sum_over_the_turns() -> None:
    given: list[tuple[dict[str, Any], dict[str, Any], float, list[float]]] = [
        ({"reward": 0.5}, {}, 0.5, []),
        ({"reward": 0.5, "turn_rewards": [1.0, 2.0, 0.0, 0.0]}, {}, 3.5, [1.0, 2.0, 0.0, 0.5]),
        ({}, {"reward": 0.5}, 0.5, []),
        ({"discount": 0.5}, {"reward": 0.5}, 0.25, []),
        ({"turn_rewards": [1.0, 0, 0, 0]}, {"reward": 0.5}, 1.5, [1.0, 0.0, 0.0, 0.5]),
        (
            {"turn_rewards": [1.0, 0, 0, 0], "discount": 0.5},
            {"reward": 2.0, "turn_rewards": [0.5, 0.5, 0.5, 0.5]},
            2.0,
            [1.25, 0.25, 0.25, 0.25],
        ),
    ]
    for fields, result, reward, turn_rewards in given:
        core = scored_core(branched(**fields), **result)
        [event] = [e for e in core.state.take_events() if isinstance(e, SampleScored)]
        assert (event.reward, event.turn_rewards) == (reward, turn_rewards)
        group = core.state.groups[0]
        assert group.rewards[0] == reward and group.turn_rewards.get(0, []) == turn_rewards


@pytest.mark.parametrize(
    "turn_rewards", [[1.0], [0.25] * 5, [math.nan, 0.0, 0.0, 0.0], [1e300, -1e300, 0.0, 0.0]]
)
def test_wrong_rewards_of_turns_are_a_failed_scoring(turn_rewards: list[float]) -> None:
    core = scored_core(branched(), turn_rewards=turn_rewards)
    assert core.state.groups[0].rewards[0] is None and not core.state.groups[0].turn_rewards
    assert len(core.scoring.assigned) == 1  # asked again
    [task] = core.scoring.assigned.values()
    assert task.num_failed == 1


def test_rewards_of_turns_survive_journal_and_restart(tmp_path: Path) -> None:
    """A batch that is sent again has the same advantages, bit by bit."""
    core = make_core(single_turn=False, max_sequences=64, prompts_per_step=1, max_staleness=0)
    lease, *_ = join_workers(core)
    samples = [branched([0.5, 0.25, 0.0, 0.0]), branched([0.0, 0.0, 1.0, 0.0], reward=0.125)]
    for index, sample in enumerate(samples):
        actions = core.handle(inputs.Received("rollout-0", Generated(lease.key(index), sample)), 0)
        for request in messages_of(actions, ScoreRequest):
            core.handle(inputs.Received("reward-0", ScoreResult(request.key, 0.75)), 0)
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append(core.state.take_events())
    journal.flush().result(60)
    again = restart_core(core, list(journal.events())).state.groups[lease.group_id]
    journal.close()
    before = core.state.groups[lease.group_id]
    assert again.turn_rewards == before.turn_rewards == {
        0: [0.5, 0.25, 0.0, 0.75], 1: [0.0, 0.0, 1.0, 0.125],
    }  # fmt: skip
    for estimator in ("turn_grpo", "turn_gae", "gae", "grpo"):
        config = configuration.from_tree(
            config_tree(
                rollout={"max_new_tokens": 64, "workflow": "multi_turn_math"},
                **{"algorithm.advantage": {"estimator": estimator, "gamma": 0.5}},
            )
        )
        first, second = (training_batch([group], config) for group in (before, again))
        assert np.array_equal(first[0], [[1.5, 1.125]]) and np.array_equal(first[1], second[1])
        assert len(first[2]) == 4  # two sequences of each sample
        for a, b in zip(first[2], second[2], strict=True):
            assert a.advantages.tobytes() == b.advantages.tobytes() and a.advantages.any()


def test_batch_for_a_critic_has_shaped_rewards_at_the_ends_of_turns() -> None:
    core = scored_core(branched([0.5, 0.0, 0.0, 0.0]), reward=1.0)
    group = core.state.groups[0]
    group.samples[1], group.rewards[1] = make_sample(0, 0), 0.0
    config = configuration.from_tree(config_tree(**{"algorithm.advantage.estimator": "gae"}))
    rewards, logged, trained = training_batch([group], config)
    assert rewards.tolist() == [[1.5, 0.0]]
    assert logged.tolist() == [[2.0, -1.0]]  # the shaped rewards
    assert [part.advantages.tolist() for part in trained] == [
        [0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, -1],
    ]  # fmt: skip


def test_sample_log_shows_the_rewards_of_turns() -> None:
    group = TrainedGroup(
        0, "0", [branched()] * 2, [1.0, 2.0], [0.0, 0.0], {1: [0.0, 0.5, 0.5, 1.0]}
    )
    lines = [sample_line(0, group, index, with_tokens=False) for index in range(2)]
    assert [line.turn_rewards for line in lines] == [[], [0.0, 0.5, 0.5, 1.0]]
    assert lines[0].turns == [[1, 3], [5, 6], [3, 4], [7, 9]]


# ---- agents and workflows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_chat_folder(tmp_path_factory.mktemp("model")))


def test_agent_posts_rewards_of_turns_over_branches(tokenizer: Tokenizer) -> None:
    async def converse() -> Sample:
        async with serving(tokenizer, "one", "two", "three") as served, ClientSession() as http:
            headers = {"Authorization": f"Bearer {served.session.key}"}

            async def post(**body: Any) -> Any:
                url = f"{served.endpoint.url}/v1/reward"
                async with http.post(url, json=body, headers=headers) as reply:
                    answer = await reply.json()
                    return answer if reply.status == 200 else answer["error"]["message"]

            first = {"role": "user", "content": "a"}
            assert "no turn" in await post(reward=1)
            await served.chat([first])
            assert await post(reward=0.25) == {"reward": 0.25, "turn": 0}
            await served.chat([{"role": "user", "content": "b"}])  # another branch
            answer = {"role": "assistant", "content": "one"}
            await served.chat([first, answer, {"role": "user", "content": "c"}])
            assert await post(reward=3) == {"reward": 3.0, "turn": 2}
            assert await post(reward=1) == {"reward": 1.0, "turn": 2}  # the last one counts
            assert await post(reward=0.5, turn=1) == {"reward": 0.5, "turn": 1}
            for turn in (3, -1):
                assert f"turn = {turn}, must be 0 to 2" in await post(reward=1, turn=turn)
            assert "integer" in await post(reward=1, turn="last")
            assert "must be a number" in await post(reward=[1])
            assert "finite" in await post(reward=2e9)
            return served.sample()

    sample = asyncio.run(converse())
    assert (sample.turn_rewards, sample.reward) == ([0.25, 0.5, 0.0], 1.0)
    assert len(sample.starts) == 2 and sample.turn_starts  # turn 1 is first in the arrays
    texts = [tokenizer.decode_all(sample.ids[a : b - 1].tolist()) for a, b in sample.turns()]
    assert texts == turn_texts(sample.text, sample.text_ends) == ["one", "two", "three"]
    settings = core_settings(single_turn=False, max_sequences=64)
    prompt = prompt_stream()()
    assert "versions" in token_fault(sample, prompt, 0, 0, settings)
    assert not token_fault(sample, prompt, 0, 100, settings)


def test_returned_rewards_replace_posted_ones() -> None:
    rewards = TurnRewards({0: 0.5, 2: 0.5})
    for returned, expected in [
        (None, {0: 0.5, 2: 0.5}),
        (2.0, {0: 0.5, 2: 2.0}),
        ({1: 1.0, 2: 3.0}, {0: 0.5, 1: 1.0, 2: 3.0}),
        ([0.0, 0.0, 4.0], {0: 0.0, 1: 0.0, 2: 4.0}),
    ]:
        rewards.give(returned, 3)
        assert rewards == expected
    with pytest.raises(HookFailed, match="2 rewards for an episode of 3 turns"):
        rewards.give([1.0, 2.0], 3)
    with pytest.raises(HookFailed, match="turn 3 of an episode of 3"):
        rewards.give({3: 1.0}, 3)
    nothing = TurnRewards()
    nothing.give(1.0, 0)
    assert not nothing


@pytest.mark.parametrize("value", ["high", True, math.nan, 2e9, [1, None], {"last": 1}, {"-1": 1}])
def test_invalid_reward_is_refused(value: Any) -> None:
    with pytest.raises(HookFailed, match=r"the agent returned .*; must be a finite number"):
        checked_rewards(value, "the agent returned")


def test_rewards_are_read_from_json() -> None:
    assert checked_rewards(None, "") is None and checked_rewards(1, "") == 1.0
    assert checked_rewards([1, 0.5], "") == [1.0, 0.5] and checked_rewards({"1": 2}, "") == {1: 2.0}


def completion(*tokens: int) -> Completion:
    return Completion([Segment(0, list(tokens), [-0.5] * len(tokens))] if tokens else [], "stop")


def test_workflow_rewards_its_turns() -> None:
    episode = Episode(np.arange(3, dtype=np.int32))
    episode.add_turn(completion(1, 2), 0.5)
    episode.add_context([7])
    episode.add_turn(completion(3))
    sample = episode.sample("stop", "x", reward=1.0)
    assert (sample.reward, sample.turn_rewards, sample.turn_starts) == (1.0, [0.5, 0.0], [])
    episode.add_turn(completion(4), 0.25)  # without context before it
    episode.add_turn(completion(), 2.0)  # no room was left
    sample = episode.sample("length", "x", discount=0.5)
    assert sample.turns() == [[3, 5], [6, 7], [7, 8]]
    assert (sample.reward, sample.turn_rewards) == (None, [0.5, 0.0, 2.25])
    assert credited(sample, 1.0, discount=0.5) == (3.25, [0.5, 0.0, 2.75])


# ---- settings


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"algorithm.advantage.estimator": "turn_grpo"}, "rollout.workflow = single_turn"),
        ({"algorithm.advantage.estimator": "turn_gae"}, "algorithm.advantage.estimator=gae"),
        (
            {"algorithm.advantage": {"estimator": "gae", "gamma": 0.0}},
            "algorithm.advantage.gamma = 0",
        ),
        (
            {
                "algorithm.advantage.estimator": "turn_grpo",
                "rollout.workflow": "multi_turn_math",
                "algorithm.samples_per_prompt": 1,
            },
            "algorithm.samples_per_prompt >= 2",
        ),
    ],
)
def test_combination_that_cannot_work_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configuration.from_tree(config_tree(**changes))
    assert problem in str(refused.value)
