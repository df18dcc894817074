"""Token sequences that engine and trainer both run, as a file between their processes."""

from __future__ import annotations

from pathlib import Path

import msgspec

NAME, ENGINE_FOLDER = "sequences.json", "engine"  # in the folder that both sides use


class ComparedSequence(msgspec.Struct, frozen=True):
    """A prompt and the engine's response to it."""

    ids: list[int]
    decoded: list[float]
    """Logprobs of the response, as the engine sampled it."""
    prefilled: list[float]
    """Logprobs of ids[1:], by one prefill of the engine."""


def write(path: Path, sequences: list[ComparedSequence]) -> None:
    path.write_bytes(msgspec.json.encode(sequences))


def read(path: Path) -> list[ComparedSequence]:
    return msgspec.json.decode(path.read_bytes(), type=list[ComparedSequence])
