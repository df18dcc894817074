"""The rows of a source: read, with their fields mapped, and checked.

Preflight reads them before a run starts; the controller reads them through dataset.py, which also
tokenizes. Rows are numbered from 1, as editors number lines.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from megatron_async_rl import hooks
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.datasets import SourceConfig, TrainingSource
from megatron_async_rl.data import math_rows, readers
from megatron_async_rl.data.code_tests import read_tests
from megatron_async_rl.errors import DataError


class Row(NamedTuple):
    place: str  # setting, file and row, for error messages
    prompt_id: str
    fields: dict[str, Any]


def training_sources(config: Config) -> list[tuple[str, TrainingSource]]:
    """Returns the sources of data.train with the names of their settings; none without steps."""
    train = config.data.train
    if not config.run.steps:
        return []
    if isinstance(train, str):
        return [("data.train", TrainingSource(path=train))]
    return [(f"data.train[{index}].path", source) for index, source in enumerate(train)]


def evaluation_sources(config: Config) -> list[tuple[str, SourceConfig]]:
    """Returns the evaluation sets with the names of their settings."""
    sets = config.evaluation.sets
    return [(f"evaluation.sets.{name}.path", chosen) for name, chosen in sets.items()]


def data_files(source: SourceConfig, config: Config) -> list[Path]:
    """Returns the files that a source consists of, in order. Raises DataError.

    For data.reader these are all files below the path; none, if the path is no file or folder.
    """
    if not _uses_reader(source, config):
        return [file for file, _ in readers.find_files(source.path, source.format, source.split)]
    path = Path(source.path)
    found = path.rglob("*") if path.is_dir() else [path]
    return sorted(file for file in found if file.is_file())


def read_rows(source: SourceConfig, setting: str, config: Config) -> Iterator[Row]:
    """Yields the rows of a source. `setting`: its key, such as data.train, for error messages.

    Raises DataError with the file, the row and the problem at the first row that cannot be used.
    """
    function = config.reward.function
    tests = function == "code"
    expected = '"tests": [{"input": "1 1", "output": "2"}]' if tests else '"answer": "2"'
    form = f'a row is like {{"prompt": "1+1=", {expected}}}'
    seen: set[str] = set()
    numbered = False  # a row without an id was found
    try:
        for number, place, columns in _raw_rows(source, config):
            try:
                fields = _checked(_mapped(columns, source.fields), function)
                named = fields.get("id")
                prompt_id = str(number if named is None else named)
                numbered = numbered or named is None
                if prompt_id in seen:
                    note = " (rows without an id have their number as id)" if numbered else ""
                    raise DataError(f"duplicate id {prompt_id!r}{note}")
            except DataError as e:
                mapped = "name the column of each field in `fields`, or " if source.fields else ""
                remedy = e.remedy or f"{mapped}correct the row: {form}"
                raise DataError(f"{place}: {e.problem}", remedy) from None
            seen.add(prompt_id)
            yield Row(f"{setting} = {place}", prompt_id, fields)
    except DataError as e:
        remedy = e.remedy or f"set {setting} to a dataset, or correct it: {form}"
        raise DataError(f"{setting} = {e.problem}", remedy) from None
    if not seen:
        problem = f"{setting} = {source.path} has no rows"
        raise DataError(problem, f"set {setting} to another dataset; {form}")


def _uses_reader(source: SourceConfig, config: Config) -> bool:
    return config.data.reader is not None and source.format == "auto"


def _raw_rows(source: SourceConfig, config: Config) -> Iterator[readers.RawRow]:
    if _uses_reader(source, config):
        return _custom_rows(config.data.reader or "", source)
    files = readers.find_files(source.path, source.format, source.split)
    return readers.read(files, source.fields.values())


def _custom_rows(reader: str, source: SourceConfig) -> Iterator[readers.RawRow]:
    """Yields the rows of data.reader: `def read(path: str, source: SourceConfig)`."""
    function = hooks.load("data.reader", reader)
    number = 0
    try:
        for number, row in enumerate(function(source.path, source), 1):
            place = f"{source.path}, row {number}"
            yield readers.RawRow(number, place, readers.as_plain(row))
    except DataError as e:
        problem = f"{source.path}, row {number}: {e.problem}"
        raise DataError(problem, f"correct data.reader = {reader}") from None
    except (Exception, SystemExit) as e:  # a user's function may raise anything
        problem = f"{source.path}, row {number + 1}: {type(e).__name__}: {e}"
        raise DataError(problem, f"correct data.reader = {reader}") from e


def _mapped(columns: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """Returns the fields named by `fields`; all columns if it is empty."""
    if not fields:
        return columns
    return {field: _value(columns, column) for field, column in fields.items()}


def _value(columns: dict[str, Any], name: str) -> Any:
    """Returns the column `name`, or the value in a nested column: `reward_model.ground_truth`.

    None if a column on the way is null in this row.
    """
    if name in columns:
        return columns[name]
    value: Any = columns
    for part in name.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or part not in value:
            known = ", ".join(_column_names(columns)) or "none"
            raise DataError(f"no column `{name}`; the columns are: {known}", "correct `fields`")
        value = value[part]
    return value


def _column_names(columns: dict[str, Any]) -> Iterator[str]:
    """Yields the names of columns, and of values in a nested column."""
    for name, value in columns.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in _column_names(value))
        else:
            yield name


def _checked(fields: dict[str, Any], reward_function: str) -> dict[str, Any]:
    """Returns the row if it has the fields that the reward function needs. Raises DataError."""
    if "prompt" not in fields:
        raise DataError(
            f"no `prompt`; the columns are: {', '.join(_column_names(fields)) or 'none'}",
            "name the column of each field, such as {path: ..., fields: {prompt: question}}",
        )
    if not isinstance(prompt := fields["prompt"], str | list) or not prompt:
        raise DataError(f"`prompt` is {reprlib.repr(prompt)}, must be a text or a list of messages")
    if reward_function == "math":
        math_rows.read_answer(fields)
    if reward_function == "code":
        if isinstance(tests := fields.get("tests"), str):  # Parquet cannot hold values of any type
            fields = fields | {"tests": readers.decode_json(tests.encode())}
        read_tests(fields)
    try:
        msgspec.msgpack.encode(fields)
    # else the controller would fail in mid-run
    except (OverflowError, UnicodeEncodeError, RecursionError) as e:
        raise DataError(f"no message can carry it: {e}", "write such values as texts") from None
    return fields
