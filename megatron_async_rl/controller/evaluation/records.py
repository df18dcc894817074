"""The samples and the result of an evaluation on disk, below run.dir/evaluations:

    v4.samples.jsonl   first a line of the settings, then a line per sample, as it ends
    v4.json            the result, written last and atomically

An evaluation that is interrupted continues with the samples in the first file, if its settings are
the same; otherwise the file is renamed. Failed samples are not kept: they are tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from megatron_async_rl.observability.status import EvaluationResult
from megatron_async_rl.storage import files

logger = logging.getLogger(__name__)

FOLDER = "evaluations"
Key = tuple[str, str, int]  # set, prompt id, index of the sample


class _Problem(msgspec.Struct):
    prompt_id: str
    tokens: list[int] = []


class _SetResult(msgspec.Struct):
    metrics: dict[str, float]
    problems: list[_Problem] = []


class _Result(msgspec.Struct):
    """The fields of a result that are read back."""

    version: int
    sets: dict[str, _SetResult]


class EvaluatedSample(msgspec.Struct, frozen=True):
    """One sample that has ended. `reward`: None if it could not be generated or scored."""

    set: str
    prompt_id: str
    index: int
    reward: float | None
    tokens: int = 0  # generated
    stop: str = "failed"  # stop, length, or failed
    versions: list[int] = []  # oldest and newest of its tokens
    answer: str = ""  # extracted by the reward function
    text: str = ""

    @property
    def key(self) -> Key:
        return self.set, self.prompt_id, self.index


def result_path(run_dir: Path, version: int) -> Path:
    return run_dir / FOLDER / f"v{version}.json"


def read_results(run_dir: Path) -> list[tuple[int, list[EvaluationResult]]]:
    """Returns the results of all versions in order; a damaged file is ignored."""
    found = []
    for path, result in _read_all(run_dir):
        if not isinstance(result, _Result):
            logger.error("%s is ignored: %s", path, result)
            continue
        sets = [EvaluationResult(result.version, n, s.metrics) for n, s in result.sets.items()]
        found.append((result.version, sets))
    return sorted(found, key=lambda entry: entry[0])


def damaged_results(run_dir: Path) -> list[tuple[Path, Exception]]:
    """Returns the files of results that cannot be read, each with its error."""
    return [(path, found) for path, found in _read_all(run_dir) if isinstance(found, Exception)]


def _read_all(run_dir: Path) -> Iterator[tuple[Path, _Result | Exception]]:
    for path in sorted((run_dir / FOLDER).glob("v*.json")):
        try:
            yield path, msgspec.json.decode(path.read_bytes(), type=_Result)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as e:
            yield path, e


def mean_tokens(run_dir: Path, version: int) -> dict[tuple[str, str], float]:
    """Returns the mean tokens of a response by (set, prompt id); empty if it cannot be read.

    A problem of failed samples alone is not in it.
    """
    try:
        content = result_path(run_dir, version).read_bytes()
        result = msgspec.json.decode(content, type=_Result)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return {
        (name, problem.prompt_id): sum(tokens) / len(tokens)
        for name, results in result.sets.items()
        for problem in results.problems
        if (tokens := [number for number in problem.tokens if number])  # a failed sample has 0
    }


def by_problem(name: str, samples: list[EvaluatedSample]) -> list[dict[str, Any]]:
    """Returns the rewards and lengths of each problem of a set; a failed sample has null."""
    problems: dict[str, list[EvaluatedSample]] = {}
    for sample in samples:
        if sample.set == name:
            problems.setdefault(sample.prompt_id, []).append(sample)
    return [
        {
            "prompt_id": prompt_id,
            "rewards": [sample.reward for sample in of_problem],
            "tokens": [sample.tokens for sample in of_problem],
        }
        for prompt_id, of_problem in problems.items()
    ]


def write_result(run_dir: Path, version: int, result: dict[str, Any]) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(result))
    files.write_atomic(result_path(run_dir, version), encoded)


class SampleFile:
    """Appends samples. `samples`: all so far, without texts, also those of an earlier start."""

    def __init__(self, run_dir: Path, version: int, settings: dict[str, Any]) -> None:
        self.path = run_dir / FOLDER / f"v{version}.samples.jsonl"
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        header = msgspec.json.encode(settings)
        self.samples: list[EvaluatedSample] = []
        complete = 0  # bytes of whole lines
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            if lines and lines[0].rstrip(b"\n") == header:
                self.samples, complete = _read(lines)
            else:
                self._rename()
        self._file = self.path.open("r+b" if complete else "wb")
        self._file.truncate(complete)  # a line that a crash cut off
        self._file.seek(complete)
        if not complete:
            self._write(header)

    def append(self, sample: EvaluatedSample) -> None:
        self.samples.append(_without_text(sample))
        if sample.reward is not None:
            self._write(msgspec.json.encode(sample))

    def close(self) -> None:
        self._file.close()

    def _write(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        self._file.flush()

    def _rename(self) -> None:
        number = 1
        while (renamed := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(renamed)


def _read(lines: list[bytes]) -> tuple[list[EvaluatedSample], int]:
    """Returns the scored samples and the number of bytes up to the first damaged line."""
    samples, complete = [], len(lines[0]) if lines[0].endswith(b"\n") else 0
    for line in lines[1:]:
        try:
            if not line.endswith(b"\n"):
                break
            sample = msgspec.json.decode(line, type=EvaluatedSample)
        except (msgspec.DecodeError, UnicodeDecodeError):
            break
        complete += len(line)
        samples.append(_without_text(sample))
    return samples, complete


def _without_text(sample: EvaluatedSample) -> EvaluatedSample:
    return msgspec.structs.replace(sample, text="")
