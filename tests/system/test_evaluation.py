"""A whole run of two servers that evaluates with one of them held, and the command `eval` after it.

The engine labels every token with the version that it was sampled under; the tests read the labels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import needs_engine
from paths import python_environment
from whole_runs import FinishedRun, RunInputs, assert_no_process_left, start_run

pytestmark = needs_engine
STEPS, SAMPLES, PROBLEMS = 8, 3, 6


def config_of(inputs: RunInputs, run_dir: Path, **evaluation: Any) -> Path:
    sets = {"held_out": {"path": str(inputs.eval), "samples": SAMPLES, "temperature": 1.0}}
    return inputs.config(
        run_dir,
        run={"steps": STEPS, "export_every": STEPS},
        rollout={"servers": 2, "max_new_tokens": 48, "max_concurrent_samples": 4},
        evaluation={"sets": sets, **evaluation},
        weights={"bucket_bytes": 65536, "verify_every": 1, "snapshot_every": 1},
        megatron={"tensor_model_parallel_size": 1, "lr": 0.01},
    )


@pytest.fixture(scope="module")
def run(run_inputs: RunInputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FinishedRun]:
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    child = start_run(config_of(run_inputs, folder, every=2, mode="held_server"))
    output, errors = child.communicate(timeout=400)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    yield FinishedRun(folder, output)


def results(folder: Path) -> dict[int, dict[str, Any]]:
    found = (json.loads(path.read_text()) for path in (folder / "evaluations").glob("v*.json"))
    return {result["version"]: result for result in found}


def test_every_token_of_an_evaluation_has_its_version(run: FinishedRun) -> None:
    found = results(run.folder)
    assert {0, STEPS} < found.keys() <= set(range(0, STEPS + 1, 2))
    for version, result in found.items():
        assert (result["oldest_version"], result["newest_version"]) == (version, version)
        assert result["mode"] == ("pause" if version == STEPS else "held_server")
        lines = (run.folder / "evaluations" / f"v{version}.samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines[1:]]
        assert len(samples) == PROBLEMS * SAMPLES
        assert all(sample["versions"] == [version, version] for sample in samples)
        metrics = result["sets"]["held_out"]["metrics"]
        assert metrics["problems"] == PROBLEMS and metrics["failed"] == 0
        rewards = [sample["reward"] for sample in samples]
        assert metrics["accuracy"] == pytest.approx(sum(rewards) / len(rewards))


def test_training_continues_while_a_server_is_held(run: FinishedRun) -> None:
    """Updates reach the other server alone meanwhile; afterwards both take part again."""
    log = run.log("controller")
    alone = re.findall(r"version (\d+) is served by (rollout-\d);", log)
    assert alone and {int(version) for version, _ in alone} <= set(range(1, STEPS + 1))
    both = re.findall(r"version (\d+) is served by rollout-0, rollout-1;", log)
    assert any(int(version) > int(alone[0][0]) for version in both)
    assert run.status.ledger["trained"] == STEPS * 4 and run.status.ledger["pending"] == 0
    lags = [line.version - version for line in run.samples for version, _ in line.versions]
    assert max(lags) <= 3


def test_result_is_in_the_table_and_in_tensorboard(run: FinishedRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert re.search(r"evaluation +held_out: [\d.]+% before \(v0\) +-> +[\d.]+% after", run.output)
    assert re.search(r"^held_out +6 .*pass|^set .*pass@2", run.log("controller"), re.MULTILINE)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    steps = [event.step for event in events.Scalars("eval/held_out/pass_at_2")]
    assert sorted(steps) == sorted(results(run.folder))


def test_eval_command_evaluates_a_version_of_the_run(
    run: FinishedRun, run_inputs: RunInputs, tmp_path: Path
) -> None:
    path = config_of(run_inputs, tmp_path / "other", mode="pause")
    command = [sys.executable, "-m", "megatron_async_rl", "eval", str(path), "rollout.servers=1"]
    command += ["--run", str(run.folder), "--version", str(STEPS), "--out", str(tmp_path / "out")]
    command += ["evaluation.sets.held_out.temperature=0", "evaluation.sets.held_out.samples=1"]
    done = subprocess.run(
        command, env=python_environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^held_out +6 ", done.stdout, re.MULTILINE)
    [result] = results(tmp_path / "out").values()
    assert result["model"] == str(run.folder / "policy")
    assert result["sets"]["held_out"]["metrics"]["problems"] == PROBLEMS
    assert result["sets"]["held_out"]["interval"] in ("Wilson", "normal over problems")
    again = subprocess.run(
        command, env=python_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert again.returncode == 0 and "held_out" in again.stdout  # complete: nothing is started
    assert_no_process_left(tmp_path / "out")
