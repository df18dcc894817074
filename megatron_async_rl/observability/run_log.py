"""Writes the controller's records below `run.dir`: metrics, samples.jsonl, status.json.

Tags of metrics are `area/name`, with the unit at the end; docs/metrics.md defines every one.
RunLog.write_samples writes those of trained samples, callers of RunLog.write_scalars the others.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path

import msgspec
import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import DataError
from megatron_async_rl.observability import sample_log
from megatron_async_rl.observability.loggers import ScalarLogger, make_logger
from megatron_async_rl.observability.prometheus import Prometheus
from megatron_async_rl.observability.sample_log import SampleLine, TrainedGroup
from megatron_async_rl.observability.status import (
    STATUS_FILE,
    RunStatus,
    bounded,
    find_status,
)
from megatron_async_rl.observability.tensorboard import TensorBoard

TENSORBOARD_DIR = "tensorboard"
HALF_TEXT = 10_000  # characters of a longer sample's begin and end in TensorBoard


class RunLog:
    """The three records of one run; only the controller writes them."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._max_staleness = config.staleness.max_staleness
        self._monitor = config.monitor
        self._started = time.monotonic()
        names = config.monitor.loggers
        self._board = TensorBoard(run_dir / TENSORBOARD_DIR) if "tensorboard" in names else None
        self._loggers: list[ScalarLogger] = [
            make_logger(name, config) for name in names if name != "tensorboard"
        ]
        if self._board:
            self._loggers.insert(0, self._board)
        if port := config.monitor.prometheus_port:
            self._loggers.append(Prometheus(config.monitor.prometheus_host, port))
        samples = run_dir / sample_log.SAMPLES_FILE
        try:
            self._last_version = sample_log.last_version(samples)
            self._samples = samples.open("ab", buffering=0)
            earlier = find_status(run_dir)  # of another controller of the run
            self.staleness_worst = earlier.staleness_worst if earlier else None
            self.write_status(
                RunStatus(
                    version=earlier.version if earlier else 0,
                    steps=config.run.steps,
                    staleness_limit=self._max_staleness,
                    staleness_worst=self.staleness_worst,
                )
            )
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # there may be space when the controller is started again
            raise DataError(
                f"{e.filename2 or e.filename or run_dir} cannot be used: {e.strerror}",
                "training does not need the file; move it away to continue without it",
            ) from None

    def write_scalars(self, version: int, scalars: dict[str, float]) -> None:
        """Writes values by their tags, to all loggers."""
        for opened in self._loggers:
            opened.scalars(version, scalars)

    def write_samples(self, version: int, groups: list[TrainedGroup]) -> None:
        """Records the samples trained on `version`; a second call, after a crash, has no effect."""
        if version <= self._last_version:
            return
        self._last_version = version
        samples = [(group, index) for group in groups for index in range(len(group.samples))]
        lines = [
            sample_log.sample_line(version, group, index, number < self._monitor.sample_tokens)
            for number, (group, index) in enumerate(samples)
        ]
        with_text = self._monitor.log_texts
        data = b"".join(
            sample_log.encode_line(
                line
                if with_text is None or number < with_text
                else msgspec.structs.replace(line, text="")
            )
            for number, line in enumerate(lines)
        )
        sample_log.append_whole(self._samples, data)
        if lines:
            self._write_statistics(version, lines)
        if self._board and lines:
            self._write_texts(self._board, version, lines)
            self._board.flush()

    def write_status(self, status: RunStatus) -> None:
        """Replaces status.json atomically; on a full disk in place, where it has room.

        The launcher takes a controller whose file does not change for one that hangs.
        """
        status = msgspec.structs.replace(
            bounded(status),
            pid=status.pid or os.getpid(),
            host=status.host or socket.gethostname(),
            elapsed_s=status.elapsed_s or time.monotonic() - self._started,
            updated_unix=time.time(),
        )
        path, encoded = self._run_dir / STATUS_FILE, msgspec.json.encode(status)
        temporary = path.with_name(STATUS_FILE + ".tmp")
        try:
            temporary.write_bytes(encoded)
            temporary.replace(path)
        except OSError:
            if not path.exists():
                raise
            os.utime(path)
            _overwrite(path, encoded)

    def close(self) -> None:
        self._samples.close()
        for opened in self._loggers:
            opened.close()

    def _write_statistics(self, version: int, lines: list[SampleLine]) -> None:
        lengths = np.array([line.num_generated for line in lines])
        # one entry per run of tokens of one version: a batch can have millions of tokens
        runs = np.array([run for line in lines for run in line.versions], np.int64).reshape(-1, 2)
        staleness, num_tokens = version - runs[:, 0], runs[:, 1]
        num_versions = np.array([len({run[0] for run in line.versions}) for line in lines])
        if board := self._board:
            board.histogram("rollout/response_tokens", lengths, version)
            board.histogram("rollout/versions_per_sample", num_versions, version)
            board.histogram("staleness/per_token", staleness, version, counts=num_tokens)
        scalars = {
            "reward/mean": np.mean([line.reward for line in lines]),
            "rollout/response_tokens_mean": lengths.mean(),
            "rollout/no_eos_fraction": np.mean([line.stop == "length" for line in lines]),
            "rollout/interrupted_fraction": np.mean([line.num_interrupts > 0 for line in lines]),
            "rollout/versions_per_sample_mean": num_versions.mean(),
            "staleness/limit": self._max_staleness,
        }
        if staleness.size:
            ends = [(line.versions[0][0], line.versions[-1][0]) for line in lines if line.versions]
            first_token, last_token = version - np.array(ends).mean(0)
            scalars |= {
                "staleness/mean": np.average(staleness, weights=num_tokens),
                "staleness/min": staleness.min(),
                "staleness/max": staleness.max(),
                "staleness/first_token": first_token,
                "staleness/last_token": last_token,
            }
        self.write_scalars(version, {tag: float(value) for tag, value in scalars.items()})

    def _write_texts(self, board: TensorBoard, version: int, lines: list[SampleLine]) -> None:
        """Writes samples from the best rewarded to the worst, evenly spaced."""
        ranked = sorted(lines, key=lambda line: -line.reward)
        num_texts = min(self._monitor.sample_texts, len(ranked))
        ranks = np.linspace(0, len(ranked) - 1, num_texts).round().astype(int)
        for slot, rank in enumerate(ranks):
            board.text(f"samples/{slot}", _markdown(ranked[rank]), version)


def _overwrite(path: Path, data: bytes) -> None:
    """Replaces a JSON document within the blocks of its file. Raises OSError if it is too long."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        found = os.fstat(descriptor)
        if len(data) > 512 * found.st_blocks:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.pwrite(descriptor, data.ljust(found.st_size), 0)  # spaces may follow a document
    finally:
        os.close(descriptor)


def _markdown(line: SampleLine) -> str:
    runs = " | ".join(f"v{version}:{length} tokens" for version, length in line.versions)
    stop = "" if line.stop == "stop" else f", ended by {line.stop}"
    # an indented block: a fence could be closed by backticks of the text
    text = line.text
    if len(text) > 2 * HALF_TEXT:
        left_out = f"\n[{len(text) - 2 * HALF_TEXT:,} characters left out]\n"
        text = text[:HALF_TEXT] + left_out + text[-HALF_TEXT:]
    text = "\n".join("    " + row for row in text.splitlines())
    return (
        f"**reward {line.reward:g}**, advantage {line.advantage:+.3f}, prompt `{line.prompt_id}`, "
        f"trained on v{line.version}{stop}\n\n`{runs}`\n\n{text}\n"
    )
