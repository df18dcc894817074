"""What a run leaves for people to look at: TensorBoard, `samples.jsonl` and `status.json`, all below `run.dir`.

Tags are `area/name`, with the unit at the end. The areas, and who fills them:

    reward/ rollout/ staleness/   of the trained samples, by `RunLog.train_samples`
    train/                        loss, clip fraction, gradient norm ...            } by `RunLog.step`
    perf/                         tokens per second; perf/time/<phase>_s: where the wall time of a step goes
    sync/                         weight updates: seconds, bytes
    eval/<set>/                   accuracy before, between and after
    ledger/                       admitted, trained, pending, dropped

AReaL's names, where ours differ: task_reward is reward/mean, seq_len rollout/response_tokens, head_offpolicyness and
tail_offpolicyness staleness/first_token and staleness/last_token.

TensorBoard's event files are written with the `tensorboard` package alone: neither torch nor TensorFlow is imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from megatron_async_rl.config import Config
from megatron_async_rl.errors import DataError
from megatron_async_rl.types import Sample

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

TENSORBOARD_DIR, SAMPLES_FILE, STATUS_FILE = "tensorboard", "samples.jsonl", "status.json"
MAX_BUCKETS = 64  # bars of a histogram
FINAL_STATES = ("finished", "failed", "stopped")


class TrainedGroup(msgspec.Struct, frozen=True):
    """The samples of one prompt, as they were trained."""

    group_id: int
    prompt_id: str
    samples: list[Sample]
    rewards: list[float]  # one per sample, as the reward function gave it
    advantages: list[float]  # one per sample


class SampleLine(msgspec.Struct, frozen=True):
    """One line of samples.jsonl: one sample that was trained."""

    version: int  # of the weights that it was trained on
    group_id: int
    prompt_id: str
    index: int  # within its group
    reward: float
    advantage: float
    num_prompt: int
    num_generated: int
    versions: list[list[int]]  # [[version, tokens], ...] of the generated tokens, in order
    stop: str
    num_interrupts: int
    text: str
    ids: list[int]  # prompt and response
    logprobs: list[float]  # of the generated tokens, as the engine gave them


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
    started_unix: float = 0.0  # 0: filled in when written
    updated_unix: float = 0.0  # always filled in when written
    version: int = 0  # training steps done
    steps: int = 0  # training steps to do
    eta_s: float | None = None  # to the end
    reward_mean: float | None = None
    reward_history: list[float] = []
    generate_tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None
    staleness_mean: float | None = None
    staleness_max: int | None = None
    staleness_limit: int = 0
    update_s: float | None = None  # the last weight update
    update_fraction: float | None = None  # share of the wall time spent in weight updates
    step_s: float | None = None
    train_wait_fraction: float | None = None  # share of the wall time that the trainer waits for data
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
        self._eta = config.staleness.eta
        self._num_texts = config.monitor.sample_texts
        self._started_unix = time.time()
        self._board = TensorBoard(run_dir / TENSORBOARD_DIR) if config.monitor.tensorboard else None
        _cut_torn_line(run_dir / SAMPLES_FILE)
        self._last_recorded = _last_version(run_dir / SAMPLES_FILE)
        self._samples = (run_dir / SAMPLES_FILE).open("ab")
        self.status(Status(steps=config.run.steps, staleness_limit=self._eta))

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
        lines = [line for group in groups for line in _sample_lines(version, group)]
        self._samples.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        self._samples.flush()
        if self._board and lines:
            self._write_numbers(self._board, version, lines)
            self._write_texts(self._board, version, lines)
            self._board.flush()

    def status(self, status: Status) -> None:
        """Replaces status.json; a reader sees the old one or the new one, whole."""
        status = msgspec.structs.replace(
            status,
            pid=status.pid or os.getpid(),
            started_unix=status.started_unix or self._started_unix,
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
        staleness, num_tokens = version - runs[:, 0], runs[:, 1]  # per run: a batch can have millions of tokens
        num_versions = np.array([len({run_version for run_version, _ in line.versions}) for line in lines])
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
            first_and_last = np.array([(line.versions[0][0], line.versions[-1][0]) for line in lines if line.versions])
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


class TensorBoard:
    """An event file of the `tensorboard` package, with a page "async RL" laid out under Custom Scalars."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # here: a third of a second that readers need not pay
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
        from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
        from tensorboard.plugins.custom_scalar.metadata import create_summary_metadata as layout_metadata
        from tensorboard.plugins.text.metadata import create_summary_metadata as text_metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._Event, self._Summary, self._Histogram = Event, Summary, HistogramProto
        self._text_metadata = text_metadata(display_name="", description="")
        self._writer = EventFileWriter(str(folder))
        self._add(_string_value(CONFIG_SUMMARY_TAG, _layout(), layout_metadata()), 0)

    def scalar(self, tag: str, value: float, step: int) -> None:
        assert "/" in tag, f"{tag!r} is not of the form area/name"
        self._add(self._Summary.Value(tag=tag, simple_value=value), step)

    def histogram(self, tag: str, values: np.ndarray, step: int, counts: np.ndarray | None = None) -> None:
        """`values` of any shape, each `counts` times (once, if not given); integers get bars of whole numbers."""
        if not values.size:
            return
        counts = np.ones_like(values) if counts is None else counts
        bars, edges = np.histogram(values, bins=_bin_edges(values), weights=counts)
        histogram = self._Histogram(
            min=values.min(),
            max=values.max(),
            num=counts.sum(),
            sum=(values * counts).sum(dtype=np.float64),
            sum_squares=(np.square(values, dtype=np.float64) * counts).sum(),
            bucket_limit=edges[1:],
            bucket=bars,
        )
        self._add(self._Summary.Value(tag=tag, histo=histogram), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._add(_string_value(tag, markdown.encode(), self._text_metadata), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, value: Summary.Value, step: int) -> None:
        self._writer.add_event(self._Event(wall_time=time.time(), step=step, summary=self._Summary(value=[value])))


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
        raise DataError(f"{path} is not the status of a run of this version: {e}; give the run.dir of a run") from None


def read_samples(run_dir: Path) -> Iterator[SampleLine]:
    """The trained samples so far, in order; a line that is still being written, or was torn by a crash, is left out."""
    decoder = msgspec.json.Decoder(SampleLine)
    with (Path(run_dir) / SAMPLES_FILE).open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield decoder.decode(line)


def _sample_lines(version: int, group: TrainedGroup) -> Iterator[SampleLine]:
    for index, (sample, reward, advantage) in enumerate(
        zip(group.samples, group.rewards, group.advantages, strict=True)
    ):
        generated = sample.generated
        num_generated = int(generated.sum())
        yield SampleLine(
            version=version,
            group_id=group.group_id,
            prompt_id=group.prompt_id,
            index=index,
            reward=float(reward),
            advantage=float(advantage),
            num_prompt=int(generated.argmax()) if num_generated else len(sample.ids),
            num_generated=num_generated,
            versions=_run_lengths(sample.versions[generated]),
            stop=sample.stop,
            num_interrupts=sample.num_interrupts,
            text=sample.text,
            ids=sample.ids.tolist(),
            logprobs=sample.logprobs[generated].tolist(),
        )


def _run_lengths(versions: np.ndarray) -> list[list[int]]:
    """[3, 3, 3, 4] -> [[3, 3], [4, 1]]"""
    starts = np.flatnonzero(np.diff(versions, prepend=versions[:1] - 1))
    lengths = np.diff(starts, append=len(versions))
    return [[int(version), int(length)] for version, length in zip(versions[starts], lengths, strict=True)]


def _markdown(line: SampleLine) -> str:
    runs = " | ".join(f"v{version}:{length} tokens" for version, length in line.versions)
    stop = "" if line.stop == "stop" else f", ended by {line.stop}"
    text = "\n".join("    " + row for row in line.text.splitlines())  # indented: holds any backticks of the text
    return (
        f"**reward {line.reward:g}**, advantage {line.advantage:+.3f}, prompt `{line.prompt_id}`, "
        f"trained on v{line.version}{stop}\n\n`{runs}`\n\n{text}\n"
    )


def _cut_torn_line(path: Path) -> None:
    """Takes away what a crash left of a line, or the next line would be glued to it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


def _last_version(path: Path) -> int:
    """The version of the last sample in a log; -1: none."""
    if not path.exists() or not path.stat().st_size:
        return -1
    with path.open("rb") as file:
        for line in file:
            last = line
    return msgspec.json.decode(last, type=SampleLine).version


def _bin_edges(values: np.ndarray) -> np.ndarray | int:
    if np.issubdtype(values.dtype, np.integer):
        low, high = int(values.min()), int(values.max())
        width = -(-(high - low + 1) // MAX_BUCKETS)
        return np.arange(low, high + width + 1, width) - 0.5
    return MAX_BUCKETS


def _string_value(tag: str, content: bytes, metadata: object) -> Summary.Value:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto

    return Summary.Value(tag=tag, metadata=metadata, tensor=TensorProto(dtype="DT_STRING", string_val=[content]))


def _layout() -> bytes:
    """The page "async RL" under Custom Scalars: does it learn, is it fresh, where does the time go."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import (
        Category,
        Chart,
        Layout,
        MarginChartContent,
        MultilineChartContent,
    )

    def lines(title: str, *tags: str) -> Chart:
        return Chart(title=title, multiline=MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))

    band = MarginChartContent.Series(value="staleness/mean", lower="staleness/min", upper="staleness/max")
    charts = [
        lines("reward", "reward/mean", "eval/.*accuracy"),
        Chart(title="staleness of trained tokens: mean, min to max", margin=MarginChartContent(series=[band])),
        lines("staleness against its limit", "staleness/max", "staleness/limit"),
        lines("where the time goes, seconds of a step", "perf/time/.*"),
        lines("weight update, seconds", "sync/.*_s"),
    ]
    return Layout(category=[Category(title="async RL", chart=charts)]).SerializeToString()
