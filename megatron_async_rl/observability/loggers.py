"""Loggers besides TensorBoard, by `monitor.loggers`: Weights & Biases and MLflow, both offline.

They get the scalars alone and write below run.dir; nothing leaves the host. Each writes in a thread
of its own, so that the controller's loop does not wait for it, and its failure costs only its
records. The packages are extras of setup.py, imported when a run starts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError

logger = logging.getLogger(__name__)
PROJECT = "megatron_async_rl"  # of Weights & Biases; experiment of MLflow
CLOSE_S = 20.0  # for the last scalars to be written
PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}


class ScalarLogger(Protocol):
    def scalars(self, version: int, values: dict[str, float]) -> None:
        """Writes values by tag; a tag may be written several times, at any version."""

    def close(self) -> None: ...


def check_installed(config: Config) -> str:
    """Returns the loggers of the run. Raises ConfigError if the package of one is missing."""
    for name in config.monitor.loggers:
        missing = [p for p in PACKAGES.get(name, ()) if importlib.util.find_spec(p) is None]
        if missing:
            raise ConfigError(
                f"monitor.loggers has {name}, but {', '.join(missing)} cannot be imported",
                f"install it (pip install 'megatron_async_rl[{name}]'), or remove {name} from "
                "monitor.loggers",
            )
    return ", ".join(config.monitor.loggers) or "none"


def make_logger(name: str, config: Config) -> ScalarLogger:
    """Returns the logger `wandb` or `mlflow`; the caller closes it."""
    return _Background(name, lambda: _KINDS[name](config.run_dir, msgspec.to_builtins(config)))


class _Background:
    """Opens a logger and writes to it in a thread."""

    def __init__(self, name: str, make: Callable[[], ScalarLogger]) -> None:
        self._name = name
        self._make = make
        self._items: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name=name, daemon=True)
        self._thread.start()

    def scalars(self, version: int, values: dict[str, float]) -> None:
        if self._thread.is_alive():
            self._items.put((version, dict(values)))

    def close(self) -> None:
        self._items.put(None)
        self._thread.join(CLOSE_S)

    def _write(self) -> None:
        try:
            with contextlib.closing(self._make()) as opened:
                while item := self._items.get():
                    opened.scalars(*item)
        except Exception:  # any error of the package: the run continues without it
            logger.exception("monitor.loggers: %s failed and gets no more scalars", self._name)


class Wandb:
    """Writes run.dir/wandb; `wandb sync run.dir/wandb/offline-run-*` uploads it."""

    def __init__(self, run_dir: Path, settings: dict[str, Any]) -> None:
        import wandb

        earlier = sorted((run_dir / "wandb").glob("offline-run-*"))  # named by time and id
        self._run = wandb.init(
            project=PROJECT,
            name=run_dir.name,
            id=earlier[-1].name.rpartition("-")[2] if earlier else None,
            dir=str(run_dir),
            config=settings,
            mode="offline",
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        # not its own step, which may only grow: a repeated version would be left out
        self._run.define_metric("*", step_metric="version")

    def scalars(self, version: int, values: dict[str, float]) -> None:
        self._run.log({"version": version, **values})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """Writes run.dir/mlflow.db; `mlflow ui --backend-store-uri sqlite:///PATH` shows it."""

    def __init__(self, run_dir: Path, settings: dict[str, Any]) -> None:
        from mlflow import entities, tracking

        self._metric = entities.Metric
        path = (run_dir / "mlflow.db").resolve()
        self._client = tracking.MlflowClient(tracking_uri=f"sqlite:///{path}")
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(PROJECT, str(run_dir / "mlflow"))
        )
        runs = self._client.search_runs([number])  # of an earlier start
        run = runs[0] if runs else self._client.create_run(number, run_name=run_dir.name)
        self._run_id = run.info.run_id
        for name, section in settings.items():
            self._client.set_tag(self._run_id, f"config.{name}", str(section)[:5000])

    def scalars(self, version: int, values: dict[str, float]) -> None:
        wall_time = time.time()
        now_ms = int(1000 * wall_time)
        metrics = [self._metric(tag, float(v), now_ms, version) for tag, v in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


_KINDS: dict[str, Callable[[Path, dict[str, Any]], ScalarLogger]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
}
