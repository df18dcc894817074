"""Loggers besides TensorBoard: they get every scalar offline, and cannot harm a run."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

import pytest
from run_log_builders import log_config, sample_of_versions, trained_group

from megatron_async_rl.errors import ConfigError
from megatron_async_rl.observability import loggers
from megatron_async_rl.observability.run_log import RunLog


def needs(name: str) -> None:
    if missing := [p for p in loggers.PACKAGES[name] if importlib.util.find_spec(p) is None]:
        pytest.skip(f"{missing} not installed: pip install '.[{name}]'")


def write_run(run_dir: Path, *names: str) -> None:
    log = RunLog(run_dir, log_config(run_dir, loggers=list(names)))
    log.write_samples(3, [trained_group(sample_of_versions((2, 5)), rewards=[0.25])])
    log.write_scalars(4, {"train/loss": 0.5, "user/format": 1.0})
    log.write_scalars(4, {"sync/total_s": 2.0})  # the same version once more
    log.close()


def test_wandb_has_every_scalar_offline(tmp_path: Path) -> None:
    needs("wandb")
    write_run(tmp_path, "wandb")

    [path] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = path.read_bytes()  # protobuf: names and values are plain in it
    for tag, value in (("reward/mean", "0.25"), ("train/loss", "0.5"), ("sync/total_s", "2")):
        assert re.search(rf"{tag}.{{,8}}{re.escape(value)}".encode(), records, re.DOTALL), tag
    write_run(tmp_path, "wandb")  # the controller restarts
    ids = {path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")}
    assert len(ids) == 1


def test_mlflow_has_every_scalar_offline(tmp_path: Path) -> None:
    needs("mlflow")
    write_run(tmp_path, "mlflow")
    write_run(tmp_path, "mlflow")  # the controller restarts
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name(loggers.PROJECT)
    assert experiment
    [run] = client.search_runs([experiment.experiment_id])
    values = {tag: run.data.metrics[tag] for tag in ("reward/mean", "train/loss", "sync/total_s")}
    assert values == {"reward/mean": 0.25, "train/loss": 0.5, "sync/total_s": 2.0}
    assert {point.step for point in client.get_metric_history(run.info.run_id, "reward/mean")} == {
        3
    }


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = log_config(tmp_path, loggers=["tensorboard", name])
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=f"monitor.loggers has {name}.*cannot be imported") as e:
        loggers.check_installed(config)
    assert f"pip install 'megatron_async_rl[{name}]'" in e.value.remedy
    assert loggers.check_installed(log_config(tmp_path)) == "tensorboard"


class Failing:
    def scalars(self, version: int, values: dict[str, float]) -> None:
        raise OSError("no space")

    def close(self) -> None:
        pass


def test_failing_logger_costs_only_its_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    opened = loggers._Background("wandb", Failing)
    for version in range(1000):
        opened.scalars(version, {"train/loss": 1.0})
    opened.close()
    assert caplog.text.count("monitor.loggers: wandb failed and gets no more scalars") == 1
    assert "no space" in caplog.text
