"""Metrics of one evaluation set from its samples. docs/evaluation.md defines each.

A sample that could not be generated or scored is only counted in `failed`, and a problem without
any scored sample is left out. A metric without samples is absent.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from megatron_async_rl.controller.evaluation import rating
from megatron_async_rl.controller.evaluation.records import EvaluatedSample

SOLVED = 1.0  # a sample solves its problem if its reward is at least this
Z_95 = 1.959964  # of the standard normal distribution, two-sided


@dataclass
class SetMetrics:
    """`values`: metric -> number. `left_out`: metric -> why it is absent."""

    values: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    interval: str = ""  # how accuracy_low and accuracy_high were computed


def set_metrics(
    samples: Iterable[EvaluatedSample], num_samples: int, ratings: dict[str, float]
) -> SetMetrics:
    """Returns the metrics of a set's samples, `num_samples` (k) of each problem.

    `ratings`: of the problems that have one, by prompt id.
    """
    everything = list(samples)
    problems: dict[str, list[EvaluatedSample]] = defaultdict(list)
    for sample in everything:
        if sample.reward is not None:
            problems[sample.prompt_id].append(sample)
    found = SetMetrics()
    found.values["failed"] = float(sum(sample.reward is None for sample in everything))
    if not problems:
        found.left_out["accuracy"] = "no sample has a score"
        return found
    scored = [sample for of_problem in problems.values() for sample in of_problem]
    found.values |= {
        "problems": float(len(problems)),
        "tokens_mean": float(np.mean([sample.tokens for sample in scored])),
        "cut_off_fraction": float(np.mean([sample.stop == "length" for sample in scored])),
    }
    _add_accuracy(found, list(problems.values()))
    _add_pass_at(found, list(problems.values()), num_samples)
    _add_majority(found, list(problems.values()), num_samples)
    rated = [(ratings[name], *_counts(of)) for name, of in problems.items() if name in ratings]
    if rated:
        estimate = rating.estimate(rated)
        found.values |= estimate.metrics()
        if estimate.rating is None:
            found.left_out["rating"] = estimate.reason
    return found


def pass_at(num_samples: int, num_right: int, k: int) -> float:
    """Returns the unbiased estimate of P(at least one of k samples is right).

    1 - C(n - c, k) / C(n, k) of n samples with c right (Chen et al., arXiv 2107.03374, eq. 1).
    """
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority(samples: list[EvaluatedSample]) -> float:
    """Returns 1 if the most frequent answer is right, 0 if not; of tied answers, their mean.

    Right answers count as one, however they are written; samples without an answer do not vote.
    """
    votes: dict[str, int] = defaultdict(int)
    for sample in samples:
        is_right = _is_solved(sample)
        if is_right or sample.answer:
            votes["" if is_right else sample.answer] += 1
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return winners.count("") / len(winners)


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """Returns the 95 % interval of a proportion (Wilson, JASA 22, 1927)."""
    p, z2 = num_right / num, Z_95**2
    center = (p + z2 / (2 * num)) / (1 + z2 / num)
    half = Z_95 / (1 + z2 / num) * math.sqrt(p * (1 - p) / num + z2 / (4 * num**2))
    return max(0.0, center - half), min(1.0, center + half)


def _add_accuracy(found: SetMetrics, problems: list[list[EvaluatedSample]]) -> None:
    """Adds avg@k, the mean over problems of their samples' mean reward, and its interval."""
    means = np.array([np.mean([sample.reward for sample in of_problem]) for of_problem in problems])
    found.values["accuracy"] = float(means.mean())
    if all(len(of) == 1 for of in problems) and np.isin(means, (0.0, 1.0)).all():
        low, high = wilson(int(means.sum()), len(means))
        found.interval = "Wilson"
    elif len(means) > 1:
        half = Z_95 * float(means.std(ddof=1)) / math.sqrt(len(means))
        low, high = found.values["accuracy"] - half, found.values["accuracy"] + half
        found.interval = "normal over problems"
    else:
        found.left_out["accuracy_low"] = "one problem has no spread"
        return
    found.values |= {"accuracy_low": low, "accuracy_high": high}


def _add_pass_at(
    found: SetMetrics, problems: list[list[EvaluatedSample]], num_samples: int
) -> None:
    k = 1
    while k <= num_samples:
        counts = [_counts(of) for of in problems if len(of) >= k]
        if counts:
            found.values[f"pass_at_{k}"] = float(np.mean([pass_at(n, c, k) for c, n in counts]))
        else:
            found.left_out[f"pass_at_{k}"] = f"no problem has {k} scored samples"
        k *= 2


def _add_majority(
    found: SetMetrics, problems: list[list[EvaluatedSample]], num_samples: int
) -> None:
    name = f"majority_at_{num_samples}"
    if num_samples == 1:
        return
    if not any(sample.answer for of_problem in problems for sample in of_problem):
        found.left_out[name] = "the reward function extracts no answers; `math` does"
        return
    found.values[name] = float(np.mean([majority(of_problem) for of_problem in problems]))


def _counts(samples: list[EvaluatedSample]) -> tuple[int, int]:
    """Returns (right, all)."""
    return sum(map(_is_solved, samples)), len(samples)


def _is_solved(sample: EvaluatedSample) -> bool:
    return sample.reward is not None and sample.reward >= SOLVED
