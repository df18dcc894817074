"""run.mode = rollout_only: batches on disk that `replay` can train, and a continued run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from needs import needs_engine
from paths import ROOT
from tiny_model import make_dataset, make_model
from whole_runs import RUN_MAX_STALENESS, RunInputs, assert_no_process_left, start_run

from megatron_async_rl.config.load import load
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.observability.status import read_status
from megatron_async_rl.protocol.types import NOT_GENERATED
from megatron_async_rl.storage import batches

pytestmark = needs_engine
STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> RunInputs:
    folder = tmp_path_factory.mktemp("inputs")
    return RunInputs(
        make_model(folder / "model"), make_dataset(folder / "train.jsonl", 60), folder / "none"
    )


def config_of(inputs: RunInputs, run_dir: Path, steps: int) -> Path:
    return inputs.config(
        run_dir,
        run={"steps": steps, "mode": "rollout_only", "export_every": 0},
        evaluation={"sets": {}},
        trainer={"data_parallel_size": 2},  # for a later `replay` of the batches
        megatron={"tensor_model_parallel_size": 1},
    )


def finish(config: Path) -> str:
    child = start_run(config)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    return output


@pytest.fixture(scope="module")
def recorded(inputs: RunInputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("rollout_only") / "run"
    output = finish(config_of(inputs, run_dir, STEPS))
    assert_no_process_left(run_dir)
    return run_dir, output


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_async_rl", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_step_writes_a_file_of_fresh_samples(recorded: tuple[Path, str]) -> None:
    run_dir, output = recorded
    assert f"batches: {run_dir}" in output.replace("\n", "")
    assert not (run_dir / "policy").exists()
    files = sorted((run_dir / "batches").iterdir())
    assert [file.name for file in files] == [f"v{n:06d}.npz" for n in range(STEPS)]
    labels = set()
    for number, file in enumerate(files):
        version, samples = batches.load(file)
        assert version == number and len(samples) == 16
        for sample in samples:
            generated = sample.versions[sample.versions != NOT_GENERATED]
            assert (
                len(generated)
                and version - RUN_MAX_STALENESS <= generated.min() <= generated.max() <= version
            )
            labels |= set(generated.tolist())
    assert max(labels) > 0  # the servers learned the new versions


def test_ledger_and_staleness_match_a_training_run(recorded: tuple[Path, str]) -> None:
    run_dir, _ = recorded
    done = command("audit", str(run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"trained={STEPS * 4}" in done.stdout and "lost=0 duplicated=0" in done.stdout
    status = read_status(run_dir)
    assert (status.state, status.version) == (
        "finished",
        STEPS,
    ) and status.staleness_max <= RUN_MAX_STALENESS


def test_replay_trains_a_recorded_batch(recorded: tuple[Path, str]) -> None:
    """On two data-parallel ranks; engine and trainer agree on the logprobs."""
    run_dir, _ = recorded
    done = command("replay", str(run_dir / "batches" / "v000000.npz"))
    assert done.returncode == 0, done.stderr
    assert "16 samples of version 0 trained" in done.stdout
    difference = re.search(r"train/logprob_diff_mean\s+(\S+)", done.stdout)
    assert difference and float(difference[1]) < 1e-4
    norm = re.search(r"train/grad_norm\s+(\S+)", done.stdout)
    assert norm and float(norm[1]) > 0


def test_run_with_more_steps_continues_where_it_stopped(
    recorded: tuple[Path, str], inputs: RunInputs
) -> None:
    run_dir, _ = recorded
    before = {file.name: file.read_bytes() for file in (run_dir / "batches").iterdir()}
    finish(config_of(inputs, run_dir, STEPS + 1))
    after = {file.name: file.read_bytes() for file in (run_dir / "batches").iterdir()}
    assert sorted(after) == [f"v{n:06d}.npz" for n in range(STEPS + 1)]
    for name in before:
        assert batches_equal(run_dir / "batches" / name, before[name])


def batches_equal(path: Path, earlier: bytes) -> bool:
    """Returns whether both hold the same samples.

    The newest batch is requested again: its file may differ in its timestamps.
    """
    copy = path.with_name("earlier.npz")
    copy.write_bytes(earlier)
    try:
        (version, samples), (other, others) = batches.load(path), batches.load(copy)
    finally:
        copy.unlink()
    return version == other and all(
        (a.ids.tolist(), a.versions.tolist(), a.advantages.tolist())
        == (b.ids.tolist(), b.versions.tolist(), b.advantages.tolist())
        for a, b in zip(samples, others, strict=True)
    )


@pytest.mark.parametrize(
    "change", [{"model": {"random_init": True}}, {"sglang": {"load_format": "dummy"}}]
)
def test_weights_that_no_server_loads_are_refused(
    inputs: RunInputs, tmp_path: Path, change: dict[str, dict[str, object]]
) -> None:
    path = inputs.config(tmp_path / "run", **({"run": {"mode": "rollout_only"}} | change))
    with pytest.raises(
        ConfigError, match=r"run\.mode = rollout_only generates from the weights in model\.path"
    ):
        load(path)
