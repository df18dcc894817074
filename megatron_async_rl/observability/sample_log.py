"""`samples.jsonl`: every sample that was trained, one line each, in order; a torn last line costs that line only.

Text and numbers are plain. Token ids and logprobs are base64 of little-endian int32 and float32, which takes a tenth of
the time of writing them out, np.frombuffer(base64.b64decode(line["ids"]), "<i4"); and they are kept of the first
`monitor.sample_tokens` samples of a step alone: a step may have gigabytes of them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from megatron_async_rl.protocol.types import Sample

SAMPLES_FILE = "samples.jsonl"


class TrainedGroup(msgspec.Struct, frozen=True):
    """The samples of one prompt, as they were trained."""

    group_id: int
    prompt_id: str
    samples: list[Sample]
    rewards: list[float]  # one per sample, as the reward function gave it
    advantages: list[float]  # one per sample


class SampleLine(
    msgspec.Struct, frozen=True, rename={"ids_bytes": "ids", "logprobs_bytes": "logprobs"}
):
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
    ids_bytes: bytes
    logprobs_bytes: bytes
    turns: list[
        list[int]
    ] = []  # [[start, end], ...] of the generated tokens in `ids`: several where it had several turns

    @property
    def ids(self) -> np.ndarray:
        """[num_tokens] int32, prompt and response."""
        return np.frombuffer(self.ids_bytes, "<i4")

    @property
    def logprobs(self) -> np.ndarray:
        """[num_generated] float32, of the generated tokens, as the engine gave them."""
        return np.frombuffer(self.logprobs_bytes, "<f4")


def read_samples(run_dir: Path) -> Iterator[SampleLine]:
    """The trained samples so far, in order; a line that is still being written, or was torn by a crash, is left out."""
    decoder = msgspec.json.Decoder(SampleLine)
    with (Path(run_dir) / SAMPLES_FILE).open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield decoder.decode(line)


def sample_line(version: int, group: TrainedGroup, index: int, with_tokens: bool) -> SampleLine:
    sample = group.samples[index]
    runs = sample.version_runs()
    return SampleLine(
        version=version,
        group_id=group.group_id,
        prompt_id=group.prompt_id,
        index=index,
        reward=float(group.rewards[index]),
        advantage=float(group.advantages[index]),
        num_prompt=int(sample.generated.argmax()) if runs else len(sample.ids),
        num_generated=sum(count for _, count in runs),
        versions=runs,
        stop=sample.stop,
        num_interrupts=sample.num_interrupts,
        text=sample.text,
        ids_bytes=sample.ids.astype("<i4", copy=False).tobytes() if with_tokens else b"",
        logprobs_bytes=sample.logprobs[sample.generated].astype("<f4", copy=False).tobytes()
        if with_tokens
        else b"",
        turns=sample.turns(),
    )


def append_whole(file: io.FileIO, data: bytes) -> None:
    """All of it or, on a disk that is full, nothing: half a line would be glued to the next. Raises OSError."""
    end = os.fstat(file.fileno()).st_size
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        file.truncate(end)
        raise


def cut_torn_line(path: Path) -> None:
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


def last_version(path: Path) -> int:
    """The version of the last sample in a log; -1: none."""
    if not path.exists() or not path.stat().st_size:
        return -1
    with path.open("rb") as file:
        for line in file:
            last = line
    return msgspec.json.decode(last, type=SampleLine).version
