"""The study of staleness: what it reads of a run, and its table over equal numbers of steps."""

from __future__ import annotations

from pathlib import Path

import study_report
from study_report import CLIPPED, STALENESS, Result, Run

from megatron_async_rl.observability.tensorboard import TensorBoard


def result(max_staleness: int, rewards: list[float], accuracies: dict[int, float]) -> Result:
    steps = {step: float(max_staleness) for step in range(len(rewards))}
    run = Run((max_staleness, "decoupled_ppo"), 1, Path("run"))
    return Result(run, rewards, accuracies, {STALENESS: steps, CLIPPED: {}})


def test_runs_are_compared_over_the_steps_that_all_have() -> None:
    synchronous = result(0, [0.0] * 8 + [0.5] * 2 + [1.0] * 10, {0: 0.1, 10: 0.5, 20: 0.9})
    stopped = result(8, [0.0] * 8 + [0.4] * 2, {0: 0.1, 10: 0.4})
    cases = [(0, "decoupled_ppo"), (8, "decoupled_ppo")]
    text = study_report.table(cases, [synchronous, stopped])
    assert text.startswith("2 runs, the first 10 steps of each.")
    assert "| 0 | decoupled_ppo | 1 | 0.500 | 100.0% | 0.500 | 100.0% | 0.00 |  |" in text
    assert "| 8 | decoupled_ppo | 1 | 0.400 | 80.0% | 0.400 | 80.0% | 8.00 |  |" in text


def test_values_of_a_resumed_run_are_those_of_its_last_steps(tmp_path: Path) -> None:
    for rewards in ({0: 0.1, 1: 0.2}, {1: 0.3, 2: 0.4}):  # step 1 is repeated
        board = TensorBoard(tmp_path / "tensorboard")
        for step, reward in rewards.items():
            board.scalars(step, {"reward/mean": reward, "eval/sums/accuracy": reward / 2})
        board.close()
    found = study_report.read(Run((4, "ppo"), 1, tmp_path))
    assert found is not None
    assert [round(reward, 3) for reward in found.rewards] == [0.1, 0.3, 0.4]
    assert {step: round(value, 3) for step, value in found.accuracies.items()} == {
        0: 0.05,
        1: 0.15,
        2: 0.2,
    }


def test_run_without_a_step_is_left_out(tmp_path: Path) -> None:
    assert study_report.read(Run((0, "ppo"), 1, tmp_path)) is None
    assert study_report.table([(0, "ppo")], []) == "no run has trained a step\n"
