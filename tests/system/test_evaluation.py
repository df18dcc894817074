"""A whole run of two servers that evaluates with one of them held, and loses a held one once.

The engine labels every token with the version that it was sampled under; the tests read the labels.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import needs_engine
from whole_runs import FinishedRun, RunInputs, processes_of_run, start_run

from megatron_async_rl.cli import audit

pytestmark = needs_engine
# an evaluation takes longer than the step in which the other server is updated alone
STEPS, SAMPLES, PROBLEMS = 12, 10, 6


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
def killed() -> list[tuple[int, str]]:
    """Returns a list for the version and the held server that `run` killed."""
    return []


@pytest.fixture(scope="module")
def run(
    run_inputs: RunInputs, tmp_path_factory: pytest.TempPathFactory, killed: list[tuple[int, str]]
) -> Iterator[FinishedRun]:
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    child = start_run(config_of(run_inputs, folder, every=2, mode="held_server"))
    killed.append(kill_held_server(folder, child))
    output, errors = child.communicate(timeout=400)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    yield FinishedRun(folder, output)


def kill_held_server(folder: Path, child: subprocess.Popen[str]) -> tuple[int, str]:
    """Kills the SGLang server that is held for an evaluation of trained weights.

    An update that the other server gets alone meanwhile tells which one it is.
    """
    log = folder / "logs" / "controller.log"
    while True:
        assert child.poll() is None, child.communicate()
        text = log.read_text() if log.exists() else ""
        begun = list(re.finditer(r"evaluation of version (\d+) \(held_server\)", text))
        if begun and (version := int(begun[-1][1])) > 0:
            updated = re.search(r" is served by rollout-(\d);", text[begun[-1].end() :])
            has_ended = (folder / "evaluations" / f"v{version}.json").exists()
            if updated and not has_ended:
                name = f"rollout-{1 - int(updated[1])}"
                for process in processes_of_run(folder):
                    if f"{folder}/keys/{name}.sglang.yaml" in process.info["cmdline"]:
                        process.kill()
                return version, name
        time.sleep(0.02)


def results(folder: Path) -> dict[int, dict[str, Any]]:
    found = (json.loads(path.read_text()) for path in (folder / "evaluations").glob("v*.json"))
    return {result["version"]: result for result in found}


def test_every_token_of_an_evaluation_has_its_version(run: FinishedRun) -> None:
    found = results(run.folder)
    assert {0, STEPS} <= found.keys() <= set(range(0, STEPS + 1, 2))
    # while the killed server starts again, an evaluation may have no server
    assert len(found) > 2 or "is abandoned after" in run.log("controller")
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


def test_training_continues_while_a_server_is_held(
    run: FinishedRun, killed: list[tuple[int, str]]
) -> None:
    """Updates reach the other server alone meanwhile; afterwards both take part again.

    A fast machine has no more than a few steps left when the killed server has started again.
    """
    [(_, name)] = killed
    log = run.log("controller")
    alone = re.findall(r"version (\d+) is served by (rollout-\d);", log)
    assert alone and {int(version) for version, _ in alone} <= set(range(1, STEPS + 1))
    joined_again = log[log.rfind(f"{name} joined") :]
    if len(re.findall(rf"step \d+/{STEPS}:", joined_again)) >= 3:
        assert re.search(
            rf"is served by rollout-0, rollout-1;|{name} has caught up with version", joined_again
        )
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


def test_lost_held_server_ends_no_evaluation_silently(
    run: FinishedRun, killed: list[tuple[int, str]]
) -> None:
    """Another server of the version continues it, or the log says why none can."""
    [(version, name)] = killed
    log = run.log("controller")
    abandoned = re.search(rf"the evaluation of version {version} is abandoned after .*: \w", log)
    assert (version in results(run.folder)) != bool(abandoned)
    assert f"{name} ended with exit code" in run.output  # and was restarted
    other = f"rollout-{1 - int(name[-1])}"
    alone = re.findall(rf"version (\d+) is served by {other};", log)
    assert max(map(int, alone)) > version  # training went on
    assert audit.run(run.folder) == 0
