"""Reads the rows of Parquet and Arrow files, in pieces, for readers.py.

pyarrow is imported when the first of them is read. Columns of bytes are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_async_rl.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Iterator[tuple[int, dict[str, Any]]]  # the number in the file, from 1, and the columns
_BATCH_ROWS = 1024
_SHORT_FLOATS: dict[str, Callable[[float], Any]] = {"float": np.float32, "halffloat": np.float16}


def read_parquet(path: Path, names: Collection[str]) -> Rows:
    """Yields the rows with the columns `names`; none: all. Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow, names)
            yield from _numbered(path, file.iter_batches(_BATCH_ROWS, columns=columns))
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, "Parquet", e) from None


def read_arrow(path: Path, names: Collection[str]) -> Rows:
    """Yields the rows like `read_parquet`."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            try:
                reader = pa.ipc.open_stream(file)  # the format of datasets
                batches: Iterator[pa.RecordBatch] = iter(reader)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            columns = _columns(path, reader.schema, names)
            yield from _numbered(path, (batch.select(columns) for batch in batches))
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, "Arrow", e) from None


def _columns(path: Path, schema: pa.Schema, names: Collection[str]) -> list[str]:
    """Returns the names of the columns to read; all, if one is missing, for the error message.

    Raises DataError for one of bytes.
    """
    readable = [field.name for field in schema if not _has_bytes(field.type)]
    if unreadable := {*names} & {*schema.names} - {*readable}:
        name = sorted(unreadable)[0]
        raise DataError(f"{path}: the column `{name}` holds bytes", "convert it to texts")
    needed = {name if name in readable else name.partition(".")[0] for name in names}
    known = bool(needed) and needed <= {*readable}
    return [name for name in readable if name in needed] if known else readable


def _has_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return any(test(kind) for test in tests) or any(_has_bytes(field) for field in inner)


def _numbered(path: Path, batches: Iterator[pa.RecordBatch]) -> Rows:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged offset would read other memory
        short = [(f.name, f.type) for f in batch.schema if _has_short_floats(f.type)]
        for start in range(0, len(batch), _BATCH_ROWS):
            for row in _rows(path, number, batch.slice(start, _BATCH_ROWS)):
                number += 1
                for name, kind in short:
                    row[name] = _shortest(row[name], kind)
                yield number, row


def _rows(path: Path, number: int, batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, KeyError) as e:
        raise DataError(
            f"{path}, row {number + 1} or one of the next {len(batch)}: a date or time that Python "
            f"cannot hold (nanoseconds, a year after 9999 or an unknown zone): {e}",
            "name the columns to read in `fields`, or convert that one to texts",
        ) from None


def _has_short_floats(kind: pa.DataType) -> bool:
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return str(kind) in _SHORT_FLOATS or any(map(_has_short_floats, inner))


def _shortest(value: Any, kind: pa.DataType) -> Any:
    """Returns the value with floats of 16 and 32 bits as they were written: 0.1, and not the
    nearest double 0.10000000149011612."""
    if str(kind) in _SHORT_FLOATS:
        return None if value is None else float(str(_SHORT_FLOATS[str(kind)](value)))
    if isinstance(value, dict):
        kinds = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return {name: _shortest(item, kinds[name]) for name, item in value.items()}
    if isinstance(value, list) and kind.num_fields == 1:
        return [_shortest(item, kind.field(0).type) for item in value]
    return value


def _unreadable(path: Path, form: str, error: Exception) -> DataError:
    problem = str(error).splitlines()[0].rstrip(".")
    return DataError(
        f"{path} cannot be read as {form}: {problem}",
        "save or download it again, or correct its `format`",
    )
