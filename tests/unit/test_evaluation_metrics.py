"""Metrics of an evaluation against exact enumeration, known values and their own definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_async_rl.controller.evaluation import rating
from megatron_async_rl.controller.evaluation.metrics import majority, pass_at, set_metrics, wilson
from megatron_async_rl.controller.evaluation.records import EvaluatedSample


def samples_of(
    *problems: list[float | None], answers: list[list[str]] | None = None
) -> list[EvaluatedSample]:
    """Returns the samples of problems given by their rewards; None: a failed sample."""
    return [
        EvaluatedSample(
            "aime",
            f"p{number}",
            index,
            reward,
            tokens=10 * (index + 1),
            stop="length" if index == 0 else "stop",
            answer=answers[number][index] if answers else "",
        )
        for number, rewards in enumerate(problems)
        for index, reward in enumerate(rewards)
    ]


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(counts: tuple[int, int]) -> None:
    n, c = counts
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_metrics_of_a_set() -> None:
    found = set_metrics(samples_of([1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]), 4, {})
    values = found.values
    assert values["accuracy"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert values["pass_at_1"] == pytest.approx(values["accuracy"])
    assert values["pass_at_2"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert values["pass_at_4"] == pytest.approx(2 / 3)
    assert (values["problems"], values["failed"]) == (3, 0)
    assert (values["tokens_mean"], values["cut_off_fraction"]) == (25, 0.25)
    half = 1.959964 * np.std([0.25, 1, 0], ddof=1) / math.sqrt(3)
    assert values["accuracy_high"] - values["accuracy"] == pytest.approx(half)
    assert found.interval == "normal over problems"
    assert "extracts no answers" in found.left_out["majority_at_4"]
    assert "rating" not in values


def test_failed_samples_are_counted_and_are_no_wrong_answers() -> None:
    found = set_metrics(samples_of([1, None], [None, None], [0, 1]), 2, {})
    assert found.values["failed"] == 3 and found.values["problems"] == 2
    assert found.values["accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert found.values["pass_at_2"] == 1  # only the third problem has two scored samples


def test_no_metric_comes_from_no_verdict() -> None:
    found = set_metrics(samples_of([None], [None]), 1, {})
    assert found.values == {"failed": 2.0}
    assert found.left_out == {"accuracy": "no sample has a score"}


def test_wilson_interval_of_one_sample_per_problem() -> None:
    found = set_metrics(samples_of(*[[1.0]] * 8, *[[0.0]] * 2), 1, {})
    assert found.interval == "Wilson"
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert (found.values["accuracy_low"], found.values["accuracy_high"]) == wilson(8, 10)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1


@pytest.mark.parametrize(
    ("rewards", "answers", "expected"),
    [
        ([1, 1, 0], ["1/2", "0.5", "3"], 1.0),  # right answers count as one
        ([1, 0, 0], ["2", "3", "3"], 0.0),
        ([1, 0, 0, 0], ["2", "", "", ""], 1.0),  # a response without an answer does not vote
        ([1, 0], ["2", "3"], 0.5),  # a tie
        ([0, 0], ["", ""], 0.0),
    ],
)
def test_majority_answer(rewards: list[float], answers: list[str], expected: float) -> None:
    assert majority(samples_of(rewards, answers=[answers])) == expected


def test_majority_is_a_metric_where_answers_are_known() -> None:
    found = set_metrics(
        samples_of([1, 1, 0], [0, 0, 1], answers=[["2"] * 3, ["3", "3", "2"]]), 3, {}
    )
    assert found.values["majority_at_3"] == 0.5


def test_rating_maximises_the_likelihood() -> None:
    problems = [(1200.0, 3, 4), (1800.0, 1, 4), (2400.0, 0, 4)]
    estimate = rating.estimate(problems)
    assert estimate.rating is not None

    def log_likelihood(value: float) -> float:
        total = 0.0
        for problem, right, num in problems:
            p = 1 / (1 + 10 ** ((problem - value) / 400))
            total += right * math.log(p) + (num - right) * math.log(1 - p)
        return total

    grid = np.arange(600, 2600, 0.5)
    best = grid[np.argmax([log_likelihood(value) for value in grid])]
    assert estimate.rating == pytest.approx(best, abs=0.5)
    # the curvature of the likelihood gives the same interval
    h = 1.0
    second = log_likelihood(best + h) - 2 * log_likelihood(best) + log_likelihood(best - h)
    assert estimate.high - estimate.rating == pytest.approx(1.959964 / math.sqrt(-second), rel=1e-3)


def test_rating_of_a_known_solver_is_found() -> None:
    random = np.random.default_rng(0)
    problems = [
        (float(r), int(random.binomial(16, rating.solve_probability(1500.0, r))), 16)
        for r in range(800, 2800, 25)
    ]
    estimate = rating.estimate(problems)
    assert estimate.low < 1500 < estimate.high and estimate.high - estimate.low < 120


def test_rating_has_only_a_bound_if_all_or_none_are_solved() -> None:
    every = rating.estimate([(1500.0, 4, 4)])
    assert every.rating is None and every.high is None and "lower bound" in every.reason
    assert rating.solve_probability(every.low, 1500.0) ** 4 == pytest.approx(0.05, rel=1e-4)
    none = rating.estimate([(1500.0, 0, 4)])
    assert none.rating is None and none.low is None and "upper bound" in none.reason
    assert (1 - rating.solve_probability(none.high, 1500.0)) ** 4 == pytest.approx(0.05, rel=1e-4)
    found = set_metrics(samples_of([1.0], [1.0]), 1, {"p0": 1500.0})
    assert found.values["rating_low"] < 1500 and "only a lower bound" in found.left_out["rating"]
