"""What a run leaves for people to look at: TensorBoard, `samples.jsonl` and `status.json`, all below `run.dir`.

Tags are `area/name`, with the unit at the end. The areas, and who fills them:

    reward/ rollout/ staleness/   of the trained samples, by `RunLog.train_samples`
    train/                        loss, clip fraction, gradient norm ...            } by `RunLog.step`
    perf/                         tokens per second; perf/time/<phase>_s: where the wall time of a step goes
    sync/                         weight updates: seconds, bytes
    eval/                         accuracy before and after
    ledger/                       admitted, trained, pending, dropped_<reason>: in groups, since the run began

AReaL's names, where ours differ: task_reward is reward/mean, seq_len rollout/response_tokens, head_offpolicyness and
tail_offpolicyness staleness/first_token and staleness/last_token.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.sample_log import (
    SAMPLES_FILE,
    SampleLine,
    TrainedGroup,
    append_whole,
    cut_torn_line,
    last_version,
    sample_line,
)
from megatron_async_rl.observability.tensorboard import TensorBoard

TENSORBOARD_DIR, STATUS_FILE = "tensorboard", "status.json"
FINAL_STATES = ("finished", "failed", "stopped")


class Server(msgspec.Struct):
    """A rollout worker and its SGLang server, as the controller sees them."""

    name: str
    state: str
    version: int
    running: int


class Evaluation(msgspec.Struct):
    version: int
    accuracy: float
    num: int  # problems


State = Literal["starting", "evaluating", "training", "finishing", "finished", "failed", "stopped"]


class Status(msgspec.Struct):
    """How a run stands: what the live display shows. None: not known yet."""

    state: State = "starting"
    message: str = ""  # what it is busy with, or why it failed
    pid: int = 0  # 0: filled in when written
    updated_unix: float = 0.0  # always filled in when written; for people, no decision goes by it
    elapsed_s: float = 0.0  # since this life of the controller began, by its monotonic clock; 0: filled in when written
    version: int = 0  # training steps done
    steps: int = 0  # training steps to do
    eta_s: float | None = None  # to the end
    reward_mean: float | None = None
    reward_history: list[float] = []
    generate_tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None
    staleness_mean: float | None = None
    staleness_max: int | None = None  # of the last step
    staleness_worst: int | None = None  # of the whole run
    staleness_limit: int = 0
    update_s: float | None = None  # the last weight update
    update_fraction: float | None = None  # share of the wall time spent in weight updates
    step_s: float | None = None
    train_wait_fraction: float | None = (
        None  # share of the wall time that the trainer waits for data
    )
    ledger: dict[str, int] = {}  # admitted, trained, pending, dropped.<reason>: in groups
    fleet: list[Server] = []
    evals: list[Evaluation] = []
    interrupted_samples: int = 0  # went on under newer weights
    lost: list[str] = []  # workers that are silent


class RunLog:
    """Writes the three. One process, the controller, owns it."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._eta = config.staleness.max_staleness
        self._num_texts = config.monitor.sample_texts
        self._num_tokens = config.monitor.sample_tokens
        self._began = time.monotonic()
        self._board = TensorBoard(run_dir / TENSORBOARD_DIR) if config.monitor.tensorboard else None
        cut_torn_line(run_dir / SAMPLES_FILE)
        self._last_recorded = last_version(run_dir / SAMPLES_FILE)
        self._samples = (run_dir / SAMPLES_FILE).open("ab", buffering=0)
        self.staleness_worst = _staleness_worst(run_dir)  # of the lives before
        self.status(
            Status(
                steps=config.run.steps,
                staleness_limit=self._eta,
                staleness_worst=self.staleness_worst,
            )
        )

    def step(self, version: int, stats: dict[str, float]) -> None:
        """Writes scalars by their tags."""
        if self._board:
            for tag, value in stats.items():
                self._board.scalar(tag, value, version)
            self._board.flush()

    def train_samples(self, version: int, groups: list[TrainedGroup]) -> None:
        """Records what is trained on the weights `version`; once, though a crash may have it sent again."""
        if version <= self._last_recorded:
            return
        self._last_recorded = version
        places = [(group, index) for group in groups for index in range(len(group.samples))]
        lines = [
            sample_line(version, *place, number < self._num_tokens)
            for number, place in enumerate(places)
        ]
        append_whole(self._samples, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        if self._board and lines:
            self._write_numbers(self._board, version, lines)
            self._write_texts(self._board, version, lines)
            self._board.flush()

    def status(self, status: Status) -> None:
        """Replaces status.json; a reader sees the old one or the new one, whole."""
        status = msgspec.structs.replace(
            status,
            pid=status.pid or os.getpid(),
            elapsed_s=status.elapsed_s or time.monotonic() - self._began,
            updated_unix=time.time(),
        )
        temporary = self._run_dir / (STATUS_FILE + ".tmp")
        temporary.write_bytes(msgspec.json.encode(status))
        temporary.replace(self._run_dir / STATUS_FILE)

    def close(self) -> None:
        self._samples.close()
        if self._board:
            self._board.close()

    def _write_numbers(self, board: TensorBoard, version: int, lines: list[SampleLine]) -> None:
        rewards = np.array([line.reward for line in lines])
        lengths = np.array([line.num_generated for line in lines])
        runs = np.array([run for line in lines for run in line.versions], np.int64).reshape(-1, 2)
        staleness, num_tokens = (
            version - runs[:, 0],
            runs[:, 1],
        )  # per run: a batch can have millions of tokens
        num_versions = np.array(
            [len({run_version for run_version, _ in line.versions}) for line in lines]
        )
        board.histogram("rollout/response_tokens", lengths, version)
        board.histogram("rollout/versions_per_sample", num_versions, version)
        board.histogram("staleness/per_token", staleness, version, counts=num_tokens)
        scalars = {
            "reward/mean": rewards.mean(),
            "rollout/response_tokens_mean": lengths.mean(),
            "rollout/no_eos_fraction": np.mean([line.stop == "length" for line in lines]),
            "rollout/interrupted_fraction": np.mean([line.num_interrupts > 0 for line in lines]),
            "rollout/versions_per_sample_mean": num_versions.mean(),
            "staleness/limit": self._eta,
        }
        if staleness.size:
            first_and_last = np.array(
                [(line.versions[0][0], line.versions[-1][0]) for line in lines if line.versions]
            )
            first_token, last_token = version - first_and_last.mean(0)
            scalars |= {
                "staleness/mean": np.average(staleness, weights=num_tokens),
                "staleness/min": staleness.min(),
                "staleness/max": staleness.max(),
                "staleness/first_token": first_token,
                "staleness/last_token": last_token,
            }
        for tag, value in scalars.items():
            board.scalar(tag, float(value), version)

    def _write_texts(self, board: TensorBoard, version: int, lines: list[SampleLine]) -> None:
        """Samples from the best rewarded to the worst, evenly spaced."""
        ranked = sorted(lines, key=lambda line: -line.reward)
        num_texts = min(self._num_texts, len(ranked))
        for slot, rank in enumerate(np.linspace(0, len(ranked) - 1, num_texts).round().astype(int)):
            board.text(f"samples/{slot}", _markdown(ranked[rank]), version)


def read_status(run_dir: Path) -> Status:
    """Raises DataError where there is no run, or what is there is no status of this version."""
    path = Path(run_dir) / STATUS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Status)
    except OSError as e:
        raise DataError(
            f"no run at {run_dir}: {path} cannot be read ({e.strerror}); give the run.dir of a run"
        ) from None
    except msgspec.DecodeError as e:
        raise DataError(
            f"{path} is not the status of a run of this version: {e}; give the run.dir of a run"
        ) from None


def _staleness_worst(run_dir: Path) -> int | None:
    try:
        return read_status(run_dir).staleness_worst
    except DataError:
        return None


def _markdown(line: SampleLine) -> str:
    runs = " | ".join(f"v{version}:{length} tokens" for version, length in line.versions)
    stop = "" if line.stop == "stop" else f", ended by {line.stop}"
    text = "\n".join(
        "    " + row for row in line.text.splitlines()
    )  # indented: holds any backticks of the text
    return (
        f"**reward {line.reward:g}**, advantage {line.advantage:+.3f}, prompt `{line.prompt_id}`, "
        f"trained on v{line.version}{stop}\n\n`{runs}`\n\n{text}\n"
    )
