"""Samples of several turns: their arrays, and a whole run with weight updates during turns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from loop_reward import even_digits
from loop_workflow import GIVEN, NUM_TURNS, TURN_TOKENS
from whole_runs import (
    FinishedRun,
    RunInputs,
    assert_no_process_left,
    fresh_logprobs,
    make_run_inputs,
    start_run,
)

from megatron_async_rl.controller.advantage import GROUP_EPS
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.engine_env import engine_python
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import NOT_GENERATED, Segment
from megatron_async_rl.rollout.workflow import Completion, Episode

STEPS, GROUPS, SAMPLES = 6, 4, 4


def test_episode_joins_given_and_sampled_tokens_in_order() -> None:
    episode = Episode(np.array([1, 2], np.int32))
    episode.add_turn(
        Completion([Segment(3, [10, 11], [-0.1, -0.2]), Segment(4, [12], [-0.3])], "stop")
    )
    episode.add_context([20, 21])
    episode.add_context(np.array([22], np.int32))
    assert episode.ids == [1, 2, 10, 11, 12, 20, 21, 22]
    episode.add_turn(Completion([Segment(4, [13], [-0.4])], "stop"))
    episode.add_context([30])
    episode.add_turn(Completion([], "length"))  # no tokens were left
    episode.add_context([31])
    sample = episode.sample("length", "text")
    assert sample.ids.tolist() == [1, 2, 10, 11, 12, 20, 21, 22, 13, 30]
    none = NOT_GENERATED
    assert sample.versions.tolist() == [none, none, 3, 3, 4, none, none, none, 4, none]
    np.testing.assert_allclose(
        sample.logprobs, [0, 0, -0.1, -0.2, -0.3, 0, 0, 0, -0.4, 0], atol=1e-7
    )
    assert (sample.stop, sample.text, sample.num_interrupts) == ("length", "text", 1)
    assert sample.turns() == [[2, 5], [8, 9]]
    assert sample.version_runs() == [[3, 2], [4, 2]]
    assert (sample.ids.dtype, sample.logprobs.dtype, sample.versions.dtype) == (
        np.int32,
        np.float32,
        np.int32,
    )


def test_episode_without_a_turn_is_refused() -> None:
    with pytest.raises(DataError, match="without a turn"):
        Episode(np.array([1], np.int32)).sample("stop", "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    if engine_python() is None:
        pytest.skip("no engine environment: bash tools/setup_env.sh")
    folder = tmp_path_factory.mktemp("turns")
    inputs: RunInputs = make_run_inputs(folder)
    config = inputs.config(
        folder / "run",
        run={"steps": STEPS},
        evaluation={"sets": {}},
        # room for one group beside that of the sample which waits for an update
        rollout={
            "workflow": "loop_workflow:ThreeTurns",
            "max_new_tokens": TURN_TOKENS,
            "max_concurrent_samples": 2 * SAMPLES,
        },
        megatron={"tensor_model_parallel_size": 1},
        algorithm={
            "prompts_per_step": GROUPS,
            "samples_per_prompt": SAMPLES,
            "advantage": {"estimator": "turn_grpo", "gamma": 0.5},
        },
    )
    child = start_run(config)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    return FinishedRun(folder / "run", output)


def test_samples_hold_their_turns_and_the_context_between_them(run: FinishedRun) -> None:
    given = Tokenizer(run.folder.parent / "model").encode(GIVEN).tolist()
    assert len(run.samples) == STEPS * GROUPS * SAMPLES
    for line in run.samples:
        assert len(line.turns) == NUM_TURNS and line.turns[0][0] == line.num_prompt
        assert (
            sum(end - start for start, end in line.turns)
            == line.num_generated
            == len(line.logprobs)
        )
        assert all(1 <= end - start <= TURN_TOKENS for start, end in line.turns)
        for (_, end), (next_one, _) in itertools.pairwise(line.turns):
            assert line.ids[end:next_one].tolist() == given


def test_every_turn_is_scored_by_the_reward_function(run: FinishedRun) -> None:
    for line in run.samples:
        turns = [turn.rpartition(" => ") for turn in line.text.split("\n")]
        assert len(turns) == NUM_TURNS
        rewards = [float(reward) for *_, reward in turns]
        assert rewards == [even_digits("", text, {}) for text, *_ in turns]
        rewards[-1] += even_digits("", line.text, {})  # the score of the whole
        assert (line.turn_rewards or [0.0, 0.0, line.reward]) == pytest.approx(rewards)
        assert line.reward == pytest.approx(sum(rewards))


def test_advantages_are_those_of_the_turns(run: FinishedRun) -> None:
    for _, lines in itertools.groupby(run.samples, lambda line: line.group_id):
        group = list(lines)
        rewards = [line.turn_rewards or [0.0, 0.0, line.reward] for line in group]
        # the shaped rewards, discounted from each turn to the end
        shaped = [[2 * a, 2 * b, 2 * c - 1] for a, b, c in rewards]
        returns = np.array([[a + b / 2 + c / 4, b + c / 2, c] for a, b, c in shaped])
        advantages = (returns - returns.mean(0)) / (returns.std(0) + GROUP_EPS)
        for line, by_turn in zip(group, advantages, strict=True):
            lengths = [end - start for start, end in line.turns]
            assert line.advantage == pytest.approx(np.average(by_turn, weights=lengths), abs=1e-6)


def test_too_long_sample_is_refused_and_its_group_accounted_for(
    run: FinishedRun,
) -> None:
    ledger = run.status.ledger
    assert ledger["trained"] == STEPS * GROUPS and ledger["pending"] == 0
    assert ledger["dropped.generation_failed"] > 0
    assert ledger["admitted"] == ledger["trained"] + sum(
        n for name, n in ledger.items() if name.startswith("dropped.")
    )
    assert "tokens, must be a Sample of at most model.context_tokens = 128" in run.log("controller")
    assert_no_process_left(run.folder)


def test_logprobs_of_each_turn_match_a_fresh_prefill(run: FinishedRun) -> None:
    spanning = [line for line in run.samples if len(line.versions) >= 2]
    assert spanning  # at least the sample that waited for an update between its turns
    whole = [line for line in run.samples if len(line.versions) == 1]
    for line in [*spanning[:12], *whole[:6]]:
        done = 0
        for version, count in line.versions:
            these = slice(done, done + count)
            np.testing.assert_allclose(
                line.logprobs[these], fresh_logprobs(run.folder, version, line)[these], atol=1e-3
            )
            done += count


def test_megatron_and_engine_agree_on_the_sampled_tokens(
    run: FinishedRun,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/logprob_diff_max")[0].value < 1e-3
    lags = [line.version - version for line in run.samples for version, _ in line.versions]
    assert max(lags) <= 3
