"""An Elo-like rating from the ratings of problems, such as those of Codeforces.

The model of Elo: a solver of rating R solves a problem of rating r with probability
1 / (1 + 10^((r - R) / 400)). Each sample is one independent attempt. The estimate maximises the
likelihood; it exists only if some attempts succeed and some fail, otherwise there is one bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SCALE = 400 / math.log(10)  # rating points per unit of log odds
Z_95 = 1.959964
UNLIKELY = 0.05  # a bound is the rating at which the outcome has this probability
_SEARCH_POINTS = 10_000.0  # beyond the ratings of the problems
_TOLERANCE = 1e-6

Attempts = tuple[float, int, int]  # rating of the problem, attempts that solved it, all attempts


@dataclass(frozen=True)
class Estimate:
    rating: float | None
    low: float | None  # 95 % bounds
    high: float | None
    reason: str = ""  # why there is no rating

    def metrics(self) -> dict[str, float]:
        values = {"rating": self.rating, "rating_low": self.low, "rating_high": self.high}
        return {name: value for name, value in values.items() if value is not None}


def solve_probability(rating: float, problem: float) -> float:
    return 0.5 * (1 + math.tanh((rating - problem) / SCALE / 2))


def estimate(problems: Sequence[Attempts]) -> Estimate:
    """Returns the maximum-likelihood rating with a 95 % interval from the Fisher information.

    If all attempts solved, only `low` is known; if none did, only `high`.
    """
    solved = sum(right for _, right, _ in problems)
    attempts = sum(num for _, _, num in problems)
    if 0 < solved < attempts:
        rating = _root(problems, lambda r: solved - _expected(problems, r))
        odds_information = sum(
            num * p * (1 - p) for r, _, num in problems for p in [solve_probability(rating, r)]
        )
        half = Z_95 * SCALE / math.sqrt(odds_information)
        return Estimate(rating, rating - half, rating + half)
    log_unlikely = math.log(UNLIKELY)
    if solved:
        low = _root(problems, lambda r: log_unlikely - _log_likelihood(problems, r))
        return Estimate(None, low, None, "every attempt solved its problem: only a lower bound")
    high = _root(problems, lambda r: _log_likelihood(problems, r) - log_unlikely)
    return Estimate(None, None, high, "no attempt solved its problem: only an upper bound")


def _expected(problems: Sequence[Attempts], rating: float) -> float:
    return sum(num * solve_probability(rating, r) for r, _, num in problems)


def _log_likelihood(problems: Sequence[Attempts], rating: float) -> float:
    total = 0.0
    for problem, right, num in problems:
        x = (rating - problem) / SCALE  # log odds
        # log P(solved) and log P(not solved), without overflow
        total -= right * _softplus(-x) + (num - right) * _softplus(x)
    return total


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _root(problems: Sequence[Attempts], decreasing: Callable[[float], float]) -> float:
    """Returns where a decreasing function of the rating is 0, by bisection."""
    ratings = [rating for rating, _, _ in problems]
    low, high = min(ratings) - _SEARCH_POINTS, max(ratings) + _SEARCH_POINTS
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        if decreasing(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
