"""A user's advantage, objective and filter in a whole run; then the filter fails after a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from needs import needs_engine
from paths import ROOT, SUPPORT
from whole_runs import FinishedRun, assert_no_process_left, make_run_inputs, start_run

from megatron_async_rl.storage import checkpoints, hook_digests

pytestmark = needs_engine
STEPS = 2

MODULE = """
import numpy as np

def advantage(rewards, lengths, config):
    centered = rewards - np.median(rewards, axis=1, keepdims=True)
    return [[np.full(n, a * config.options["scale"]) for a, n in zip(row, tokens)]
            for row, tokens in zip(centered, lengths)]

def objective(inputs, config):
    ratio_T = (inputs.logprobs_T - inputs.old_T).exp()
    return -inputs.advantages_T * ratio_T, {"twice": 2 * inputs.mask_T.float()}

def keep(rewards, lengths, row, config):
    return len(set(rewards)) > 1
"""
NAMES = {
    "algorithm.advantage.estimator": "our_algorithm:advantage",
    "algorithm.filters.function": "our_algorithm:keep",
    "algorithm.loss.objective": "our_algorithm:objective",
}


def test_own_algorithm_trains_and_its_error_ends_the_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = tmp_path / "our_algorithm.py"
    module.write_text(MODULE)
    python_path = os.pathsep.join([str(ROOT), str(SUPPORT), str(tmp_path)])
    run_dir = tmp_path / "run"
    path = make_run_inputs(tmp_path).config(
        run_dir,
        run={"steps": STEPS, "export_every": 0},
        evaluation={"sets": {}},
        rollout={"max_new_tokens": 24, "max_concurrent_samples": 16},
        megatron={"tensor_model_parallel_size": 1},
        checkpoint={"every": 1},
        algorithm={
            "advantage": {"estimator": "our_algorithm:advantage", "options": {"scale": 0.5}},
            "filters": {"function": "our_algorithm:keep"},
            "loss": {"objective": "our_algorithm:objective"},
        },
    )
    child = start_run(path, PYTHONPATH=python_path)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    run = FinishedRun(run_dir, output)
    assert run.status.ledger["trained"] == STEPS * 4
    for start in range(0, len(run.samples), 4):  # a group's samples follow each other
        group = run.samples[start : start + 4]
        shaped = [2 * (line.reward - 0.5) for line in group]
        wanted = 0.5 * (np.array(shaped) - np.median(shaped))
        np.testing.assert_allclose([line.advantage for line in group], wanted, atol=1e-6)
        assert len({line.reward for line in group}) > 1
    figures = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [point.value for point in figures.Scalars("train/user/twice")] == [2.0] * STEPS
    recorded = hook_digests.read(run_dir)
    named = {setting: text.split()[0] for setting, text in recorded.items()}
    assert named == NAMES | {"reward.function": "loop_reward:even_digits"}
    assert [m.hooks for m in checkpoints.list_manifests(run_dir)] == [recorded] * 2

    module.write_text(MODULE.replace("return len(set(rewards)) > 1", 'return row["level"] > 3'))
    child = start_run(path, f"run.steps={STEPS + 2}", PYTHONPATH=python_path)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 2
    for setting, name in NAMES.items():
        was = f"was {name} sha256:{recorded[setting].rpartition(':')[2]}, is {name} sha256:"
        assert f"{setting} is another function than at the last start of this run: {was}" in output
    failure = "algorithm.filters.function = our_algorithm:keep failed: KeyError: 'level'"
    assert failure in errors and 'return row["level"] > 3' in errors
    assert run.log("controller").count(failure) == 1  # it was not restarted
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    assert_no_process_left(run_dir)
