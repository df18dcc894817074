"""The command `eval` before it starts anything: which weights, which sets, and its errors."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import yaml
from config_builders import config_tree

from megatron_async_rl import __main__
from megatron_async_rl.cli.evaluate import policy_folder
from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.status import RunStatus


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Returns a finished run of 10 steps that has exported versions 4 and 10."""
    folder = tmp_path / "run"
    for name in ("policy-v4", "policy-v10", "policy", "policy-vx"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_tree()))
    status = RunStatus(state="finished", version=10, steps=10)
    (folder / "status.json").write_bytes(msgspec.json.encode(status))
    return folder


def test_version_of_a_run_is_found_among_its_weights(run_dir: Path) -> None:
    assert policy_folder(run_dir, 4) == run_dir / "policy-v4"
    assert policy_folder(run_dir, None) == policy_folder(run_dir, 10) == run_dir / "policy"
    assert policy_folder(run_dir, 0) == Path("models/a")  # model.path of the run


def test_version_that_was_not_kept_is_refused_with_those_that_were(run_dir: Path) -> None:
    with pytest.raises(DataError, match=r"--version 7: .* has the weights of versions 0, 4, 10"):
        policy_folder(run_dir, 7)


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no run at {tmp_path}"):
        policy_folder(tmp_path, None)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--sets", "amc"], "--sets amc: evaluation.sets has no such set; it has aime"),
        (["--version", "3"], "--version needs --run RUN_DIR"),
        (["evaluation.sets={}"], "evaluation.sets is empty: there is nothing to evaluate"),
        (["evaluation.sets.amc.samples=2"], "evaluation.sets.amc.path is not set"),
        (["evaluation.sets.aime.path=none.jsonl"], "evaluation.sets.aime.path = none.jsonl"),
    ],
)
def test_error_is_one_line_with_setting_and_remedy(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    sets = {"aime": {"path": "aime.jsonl"}}
    path.write_text(yaml.safe_dump(config_tree(evaluation={"sets": sets})))
    assert __main__.main(["eval", str(path), *arguments]) == 2
    assert problem in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]  # nothing was begun
