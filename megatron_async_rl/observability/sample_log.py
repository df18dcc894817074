"""`samples.jsonl`: one line for each trained sample, in order; a torn last line is ignored.

The last field of a line, crc32, is the checksum of the bytes before it.

Text and numbers are plain JSON. Token ids and logprobs are base64 of little-endian int32 and
float32, np.frombuffer(base64.b64decode(line["ids"]), "<i4"), which takes a tenth of the time of
JSON numbers. A step can have gigabytes of them, so only the first `monitor.sample_tokens` samples
of it keep them, and with `monitor.log_texts` only the first ones the text.
"""

from __future__ import annotations

import io
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import Sample

logger = logging.getLogger(__name__)
SAMPLES_FILE = "samples.jsonl"
BLOCK_BYTES = 1 << 20


class TrainedGroup(msgspec.Struct, frozen=True):
    """The samples of one prompt, as they were trained."""

    group_id: int
    prompt_id: str
    samples: list[Sample]
    rewards: list[float]  # one per sample: the sum over its turns
    advantages: list[float]  # one per sample: the mean over its tokens
    turn_rewards: dict[int, list[float]] = {}  # by index; elsewhere the last turn has it all


class SampleLine(
    msgspec.Struct, frozen=True, rename={"ids_bytes": "ids", "logprobs_bytes": "logprobs"}
):
    """One line of samples.jsonl."""

    version: int  # of the weights that were trained on it
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
    turns: list[list[int]] = []  # [[start, end], ...] of their tokens in `ids`, in order of calls
    turn_rewards: list[float] = []  # one per turn; empty: `reward` is the last turn's
    starts: list[int] = []  # of the training sequences in `ids`; empty: one sequence

    @property
    def ids(self) -> np.ndarray:
        """[num_tokens] int32: prompt and response."""
        return np.frombuffer(self.ids_bytes, "<i4")

    @property
    def logprobs(self) -> np.ndarray:
        """[num_generated] float32: behavior logprobs from the engine."""
        return np.frombuffer(self.logprobs_bytes, "<f4")


def refuse(damage: str) -> None:
    raise DataError(damage, "training does not need the file; move it away to continue without it")


def read_samples(run_dir: Path, on_damage: Callable[[str], None] = refuse) -> Iterator[SampleLine]:
    """Yields the trained samples in order, without an incomplete last line.

    `on_damage` gets a text for each damaged line. It raises DataError unless another function is
    given, which has the line skipped.
    """
    path = Path(run_dir) / SAMPLES_FILE
    try:
        with path.open("rb") as file:
            for number, encoded in enumerate(file, 1):
                if not encoded.endswith(b"\n"):
                    return
                if line := decode_line(encoded):
                    yield line
                else:
                    problem = "does not match its checksum; lost: its sample"
                    on_damage(f"{path}: line {number} {problem}")
    except OSError as e:
        on_damage(f"{path} cannot be read: {e.strerror}; lost: all trained samples")


def encode_line(line: SampleLine) -> bytes:
    """Returns the line with its checksum."""
    body = msgspec.json.encode(line)[:-1]
    return b'%s,"crc32":"%08x"}\n' % (body, zlib.crc32(body))


def decode_line(encoded: bytes) -> SampleLine | None:
    """Returns None if the line is damaged."""
    body, _, checksum = encoded.rpartition(b',"crc32":"')
    if checksum != b'%08x"}\n' % zlib.crc32(body):
        return None
    return msgspec.json.decode(encoded, type=SampleLine)


def sample_line(version: int, group: TrainedGroup, index: int, with_tokens: bool) -> SampleLine:
    sample = group.samples[index]
    runs = sample.version_runs()
    logprobs = sample.logprobs[sample.generated].astype("<f4", copy=False)
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
        logprobs_bytes=logprobs.tobytes() if with_tokens else b"",
        turns=sample.turns(),
        turn_rewards=group.turn_rewards.get(index, []),
        starts=sample.starts,
    )


def append_whole(file: io.FileIO, data: bytes) -> None:
    """Appends all of `data` or, with OSError on a full disk, nothing: no half line is left."""
    end = os.fstat(file.fileno()).st_size
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        file.truncate(end)
        raise


def last_version(path: Path) -> int:
    """Returns the version of the last intact sample in a log; -1 if there is none.

    Removes an incomplete last line, so that the next line does not continue it.
    """
    if not path.exists():
        return -1
    with path.open("rb+") as file:  # from its end: the file of a long run takes an hour to read
        end = _start_of_line(file, file.seek(0, os.SEEK_END))
        file.truncate(end)
        start = _start_of_line(file, end - 1)
        file.seek(start)
        last = file.read(end - start)
    if not last:
        return -1
    if line := decode_line(last):
        return line.version
    logger.error("%s: the last line is damaged; lost: its sample", path)
    return max((line.version for line in read_samples(path.parent, logger.error)), default=-1)


def _start_of_line(file: BinaryIO, end: int) -> int:
    """Returns the position after the last line end before `end`; 0 if there is none."""
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        file.seek(start)
        if found := file.read(end - start).rfind(b"\n") + 1:
            return start + found
        end = start
    return 0
