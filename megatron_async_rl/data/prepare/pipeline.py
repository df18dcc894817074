"""Reads a published dataset, converts and filters its rows, and writes them with a report.

Every row that is read is either written or counted under the reason why it was dropped. The output
depends on the input files and options alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np

from megatron_async_rl.data import readers
from megatron_async_rl.data.prepare.columns import Unusable, text
from megatron_async_rl.data.prepare.kinds import KINDS
from megatron_async_rl.data.prepare.similarity import EvaluationTexts, fingerprint
from megatron_async_rl.data.success_rate import prompt_text
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.storage import files

PROGRESS_S = 5.0
CONTAMINATED = "in an evaluation set"  # a reason for which rows are dropped
_PROBLEM_COLUMNS = ("problem", "question", "question_content", "description", "Problem", "Question")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    split: str | None = None  # of a folder with several
    evaluation_sets: tuple[str, ...] = ()  # to decontaminate against
    ngram: int = 13
    num_validation: int = 0  # rows to write to their own file instead
    max_tests: int | None = None  # of a row; the first are kept
    model: str | None = None  # folder of the model that counts tokens


class Contamination(msgspec.Struct, frozen=True):
    row: str  # its id
    evaluation: str  # file and row of the evaluation set
    words: str  # that both contain


class Report(msgspec.Struct):
    """Counts of one `prepare`; written as JSON beside the output."""

    kind: str
    source: str
    options: Options
    read: int = 0
    kept: int = 0
    validation: int = 0
    dropped: dict[str, int] = {}
    left_out_tests: int = 0  # by max_tests
    contaminated: list[Contamination] = []
    lengths: dict[str, dict[str, int]] = {}  # characters, tokens or tests: min, median, p95, max
    files: dict[str, str] = {}  # path -> sha256


def prepare(
    kind: str,
    source: str,
    out: Path,
    options: Options,
    progress: Callable[[str], None],
) -> Report:
    """Writes `out`, with num_validation also OUT.val.jsonl, and OUT.report.json.

    `progress` is called with a text every few seconds. Raises ConfigError or DataError, for rows
    that no reader understands; existing files are then left as they are.
    """
    if kind not in KINDS:
        raise ConfigError(f"KIND = {kind!r} is unknown", f"choose one of {', '.join(KINDS)}")
    lowest = {"ngram": 1, "num_validation": 0, "max_tests": 1}
    for name, limit in lowest.items():
        if (value := getattr(options, name)) is not None and value < limit:
            option = {"num_validation": "val"}.get(name, name.replace("_", "-"))
            raise ConfigError(f"--{option} = {value}: expected a number >= {limit}", "change it")
    if out.suffix != ".jsonl":
        raise ConfigError(f"OUT = {out}: expected a name that ends in .jsonl", "rename it")
    report = Report(kind, source, options)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".prepare-", dir=out.parent) as folder:
        rows = Path(folder) / "rows"
        kept = _write_rows(rows, report, progress)
        if not kept:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
            remedy = f"give a dataset with the columns {KINDS[kind].columns}"
            if CONTAMINATED in report.dropped:
                remedy = "check the files of --decontaminate, or give a larger --ngram"
            raise DataError(
                f"{source}: none of {report.read:,} rows can be used as {kind} ({reasons})", remedy
            )
        report.kept = len(kept)
        if count := options.num_validation:
            report.kept, report.validation = len(kept) - count, count
            rows, validation = _split(rows, kept, count)
            validation.replace(out.with_suffix(".val.jsonl"))
        rows.replace(out)
    written = [out, out.with_suffix(".val.jsonl")][: 2 if options.num_validation else 1]
    report.files = {str(path): files.digest(path) for path in written}
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=2)
    files.write_atomic(report_path(out), encoded + b"\n")
    return report


def report_path(out: Path) -> Path:
    return out.with_suffix(".report.json")


def _write_rows(path: Path, report: Report, progress: Callable[[str], None]) -> list[bytes]:
    """Writes the usable rows and returns their fingerprints in order."""
    tokenizer = Tokenizer(report.options.model) if report.options.model else None
    evaluation = _evaluation_texts(report.options)
    lengths: dict[str, list[int]] = {}
    kept = []
    with path.open("wb") as file:
        for row, own in _usable_rows(report, evaluation, progress):
            _measure(row, lengths, tokenizer)
            file.write(msgspec.json.encode(row) + b"\n")
            kept.append(own)
    report.lengths = {name: _summary(values) for name, values in lengths.items()}
    return kept


def _usable_rows(
    report: Report, evaluation: EvaluationTexts | None, progress: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields the rows to write with their fingerprints, and counts the others."""
    dropped: Counter[str] = Counter()
    answers: dict[bytes, Any] = {}
    ids: set[str] = set()
    said = time.monotonic()
    convert = KINDS[report.kind].convert
    for raw in _raw_rows("IN", report.source, report.options.split):
        report.read += 1
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            progress(f"{report.read:,} rows read, {report.read - dropped.total():,} kept")
        try:
            row = convert(raw.columns)
            own = fingerprint(row["prompt"])
            if own in answers:
                same = answers[own] == row.get("answer")
                raise Unusable("duplicate" if same else "duplicate with another answer")
            row = {"id": _new_id(report.kind, raw, ids)} | row
            problem = text(raw.columns, *_PROBLEM_COLUMNS)  # without starter code and examples
            if evaluation and (found := evaluation.find(problem)):
                report.contaminated.append(Contamination(row["id"], *found))
                raise Unusable(CONTAMINATED)
        except Unusable as e:
            dropped[str(e)] += 1
            report.dropped = dict(sorted(dropped.items()))
            continue
        answers[own] = row.get("answer")
        ids.add(row["id"])
        limit = report.options.max_tests
        if limit is not None and len(row.get("tests", ())) > limit:
            report.left_out_tests += len(row["tests"]) - limit
            row["tests"] = row["tests"][:limit]
        yield row, own


def _raw_rows(argument: str, path: str, split: str | None = None) -> Iterator[readers.RawRow]:
    try:
        yield from readers.read(readers.find_files(path, split=split))
    except DataError as e:
        remedy = e.remedy or "name a file or folder of JSONL, JSON, Parquet or Arrow"
        raise DataError(f"{argument} = {e.problem}", remedy) from None


def _new_id(kind: str, raw: readers.RawRow, taken: set[str]) -> str:
    """Returns the published id of a row with the kind before it; its number, if it has none."""
    names = ("id", "ID", "problem_id", "question_id", "unique_id", "name")
    found = next(
        (raw.columns[n] for n in names if raw.columns.get(n) not in (None, "")), raw.number
    )
    name = f"{kind}/{found}"
    return name if name not in taken else f"{name}#{raw.number}"


def _evaluation_texts(options: Options) -> EvaluationTexts | None:
    if not options.evaluation_sets:
        return None
    texts = EvaluationTexts(options.ngram)
    for path in options.evaluation_sets:
        for raw in _raw_rows("--decontaminate", path):
            problem = text(raw.columns, *_PROBLEM_COLUMNS)
            if prompt := raw.columns.get("prompt"):
                problem = prompt_text(prompt)
            if not problem:
                raise DataError(
                    f"--decontaminate = {raw.place}: no problem in the columns "
                    f"{', '.join(raw.columns)}",
                    f"name it prompt or {' or '.join(_PROBLEM_COLUMNS[:4])}",
                )
            texts.add(problem, raw.place)
    return texts


def _split(rows: Path, kept: list[bytes], count: int) -> tuple[Path, Path]:
    """Returns two files: the other rows, and the `count` rows with the smallest fingerprints."""
    if count >= len(kept):
        raise ConfigError(f"--val {count} leaves no training row of {len(kept):,}", "lower it")
    chosen = {*sorted(range(len(kept)), key=kept.__getitem__)[:count]}
    parts = rows.with_name("train"), rows.with_name("val")
    with rows.open("rb") as file, parts[0].open("wb") as train, parts[1].open("wb") as validation:
        for number, row in enumerate(file):
            (validation if number in chosen else train).write(row)
    return parts


def _measure(
    row: dict[str, Any], lengths: dict[str, list[int]], tokenizer: Tokenizer | None
) -> None:
    values = {"prompt characters": len(row["prompt"])}
    if tokenizer:
        values["prompt tokens"] = len(tokenizer.encode(row["prompt"]))
    if "tests" in row:
        values["tests"] = len(row["tests"])
    for name, value in values.items():
        lengths.setdefault(name, []).append(value)


def _summary(values: list[int]) -> dict[str, int]:
    low, median, high = np.percentile(values, [0, 50, 95], method="lower").tolist()
    return {"min": low, "median": median, "p95": high, "max": max(values)}
