"""Figures of a training step: engine-trainer mismatch, means over minibatches."""

from __future__ import annotations

import pytest

from megatron_async_rl.trainer.algorithms.loss import MAXIMA, SUMS
from megatron_async_rl.trainer.report import PACKING_SUMS, summary


def minibatch(**changed: float) -> dict[str, float]:
    names = (*SUMS, *PACKING_SUMS, *MAXIMA, "cost_max", "grad_norm", "stopped", "overflowed")
    return (
        dict.fromkeys(names, 0.0)
        | {"tokens": 10.0, "packed": 20.0, "budget": 40.0, "least_budget": 25.0}
        | {"cost": 30.0, "microbatches": 2.0, "cost_max": 18.0}
        | changed
    )


def test_mismatch_covers_tokens_of_the_current_version() -> None:
    stats = summary(
        [
            minibatch(
                current_tokens=5,
                compared_tokens=4,
                logprob_diff=0.4,
                logprob_diff_max=0.3,
                mismatch_kl=0.02,
                mismatch_beyond_cap=1,
            ),
            minibatch(current_tokens=1, compared_tokens=1, logprob_diff=0.1, logprob_diff_max=0.1),
        ]
    )
    assert (
        stats["train/logprob_diff_mean"] == pytest.approx(0.1)
        and stats["train/logprob_diff_max"] == 0.3
    )
    assert stats["train/mismatch_kl"] == pytest.approx(0.004)
    assert (
        stats["train/mismatch_beyond_cap_fraction"] == 0.2
        and stats["train/current_version_fraction"] == 0.3
    )


def test_step_without_compared_tokens_has_no_mismatch() -> None:
    stats = summary([minibatch(), minibatch()])
    assert [name for name in stats if "mismatch" in name or "logprob_diff" in name] == []
    assert stats["train/current_version_fraction"] == 0


def test_skipped_minibatch_reports_no_gradient_norm() -> None:
    stats = summary([minibatch(grad_norm=3.0), minibatch(overflowed=1.0)])
    assert stats["train/grad_norm"] == 3.0 and stats["train/overflowed_minibatches"] == 1
    assert summary([minibatch(overflowed=1.0)])["train/grad_norm"] == 0


def test_report_gives_fill_and_its_upper_bound() -> None:
    stats = summary([minibatch(), minibatch()])
    assert (stats["train/packing_efficiency"], stats["train/packing_bound"]) == (0.5, 0.8)
    assert stats["train/packing_imbalance"] == pytest.approx(1.2)  # 18 over a mean of 15
