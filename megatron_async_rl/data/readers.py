"""Reads rows of datasets: JSONL, JSON, Parquet and Arrow files, and folders of them.

Rows are plain data (text, numbers, lists, mappings); columns of bytes, such as images, are left
out. Files are read in pieces, except JSON. Errors are DataErrors that begin with file and row.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from megatron_async_rl.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1024
_SUFFIXES = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # as the Hugging Face hub names the files of a split


class RawRow(NamedTuple):
    number: int  # in its source, from 1; in a JSONL file the number of its line
    place: str  # file and row, for error messages
    columns: dict[str, Any]


def read(files: list[tuple[Path, str]], names: Collection[str] = ()) -> Iterator[RawRow]:
    """Yields the rows of (file, format) pairs in order.

    `names`: the columns to read, if the format allows to skip others; none reads all.
    """
    offset = number = 0
    for path, form in files:
        for number, columns in _READERS[form](path, names):
            yield RawRow(offset + number, f"{path}, row {number}", columns)
        offset, number = offset + number, 0


def find_files(path: str, form: str = "auto", split: str | None = None) -> list[tuple[Path, str]]:
    """Returns the (file, format) pairs of a source: a file, a folder, or a split of a folder.

    Raises DataError if the folder has none, or several splits and none is chosen.
    """
    root = Path(path)
    if not root.is_dir():
        return [(root, _format(root) if form == "auto" else form)]
    folder = _dataset_folder(root, split)
    if (folder / "state.json").exists():
        return [(file, "arrow") for file in _saved_files(folder)]
    suffixes = [s for s, f in _SUFFIXES.items() if form in ("auto", f) and s != ".json"]
    for suffix in suffixes:
        if files := sorted(folder.glob(f"*{suffix}")):
            return [(file, _SUFFIXES[suffix]) for file in _of_split(files, split, folder)]
    raise DataError(
        f"{path} has no dataset in it",
        "name a file, a folder of .jsonl, .parquet or .arrow files, or one saved by save_to_disk",
    )


def as_plain(row: Any) -> dict[str, Any]:
    """Returns a row as plain data: dates and decimals as text. Raises DataError."""
    if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
        raise DataError(f"a row is a {type(row).__name__}, must be a dict of columns by name")
    try:
        return msgspec.to_builtins(row)
    except (TypeError, RecursionError) as e:
        raise DataError(f"a row has values that are not plain data: {e}") from None


def decode_json(text: bytes) -> Any:
    """Returns the value of a JSON text. Raises DataError with the problem alone."""
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError("not UTF-8 but UTF-16: save the file as UTF-8")
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as e:
        raise DataError(f"not JSON: {e}") from None
    except UnicodeDecodeError:
        raise DataError("not UTF-8: save the file as UTF-8") from None
    except RecursionError:
        raise DataError("nested too deeply") from None


# ---- files of a folder


def _format(path: Path) -> str:
    form = _SUFFIXES.get(path.suffix.lower(), "jsonl")
    if form == "json" and path.exists():  # many JSONL files are named .json
        with path.open("rb") as file:
            start = file.read(256).removeprefix(codecs.BOM_UTF8).lstrip()
        return "json" if start.startswith(b"[") else "jsonl"
    return form


def _dataset_folder(root: Path, split: str | None) -> Path:
    """Returns the folder of the split if `root` is a saved DatasetDict, else `root`."""
    splits = sorted(path.parent.name for path in root.glob("*/state.json"))
    if not splits or (root / "state.json").exists():
        return root
    if split is None and len(splits) == 1:
        return root / splits[0]
    return root / _chosen(split, splits, root)


def _saved_files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(
            f"{folder / 'state.json'} cannot be read: {e}", "save the dataset again"
        ) from None
    if missing := [file for file in files if not file.exists()]:
        raise DataError(f"{missing[0]} is missing, which state.json names", "copy the whole folder")
    return files


def _of_split(files: list[Path], split: str | None, folder: Path) -> list[Path]:
    """Returns the files of the split; without one all files, which must be of the same split."""
    names = [match[1] if (match := _SHARD.fullmatch(f.stem)) else f.stem for f in files]
    splits = {n for n, file in zip(names, files, strict=True) if n != file.stem or n in _SPLITS}
    if split is None and len(splits) <= 1:
        return files
    chosen = _chosen(split, sorted({*names}), folder)
    return [file for file, name in zip(files, names, strict=True) if name == chosen]


def _chosen(split: str | None, splits: list[str], folder: Path) -> str:
    if split is not None and split in splits:
        return split
    problem = "has several splits" if split is None else f"has no split {split!r}"
    raise DataError(f"{folder} {problem}", f"set `split` to one of {', '.join(splits)}")


# ---- formats: each yields (row number in the file, columns)

_Rows = Iterator[tuple[int, dict[str, Any]]]


def _read_jsonl(path: Path, names: Collection[str]) -> _Rows:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    with _at(f"{path}, row {number}"):
                        row = _object(decode_json(line))
                    yield number, row
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None


def _read_json(path: Path, names: Collection[str]) -> _Rows:
    try:
        text = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None
    with _at(str(path)):
        rows = decode_json(text)
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of rows", "write one row per line, as .jsonl")
    for number, row in enumerate(rows, 1):
        with _at(f"{path}, row {number}"):
            _object(row)
        yield number, row


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    return row


@contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except DataError as e:
        raise DataError(f"{place}: {e}") from None


def _read_parquet(path: Path, names: Collection[str]) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow, names)
            yield from _numbered(file.iter_batches(_BATCH_ROWS, columns=columns))
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, "Parquet", e) from None


def _read_arrow(path: Path, names: Collection[str]) -> _Rows:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            try:
                reader = pa.ipc.open_stream(file)  # the format of datasets
                batches: Iterator[pa.RecordBatch] = iter(reader)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            columns = _columns(reader.schema, names)
            yield from _numbered(batch.select(columns) for batch in batches)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, "Arrow", e) from None


def _columns(schema: pa.Schema, names: Collection[str]) -> list[str]:
    """Returns the names of the columns to read; all, if one is missing, for the error message."""
    readable = [field.name for field in schema if not _has_bytes(field.type)]
    needed = {name if name in readable else name.partition(".")[0] for name in names}
    known = bool(needed) and needed <= {*readable}
    return [name for name in readable if name in needed] if known else readable


def _has_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return any(test(kind) for test in tests) or any(_has_bytes(field) for field in inner)


def _numbered(batches: Iterator[pa.RecordBatch]) -> _Rows:
    number = 0
    for batch in batches:
        for start in range(0, len(batch), _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                yield number, as_plain(row)


def _unreadable(path: Path, form: str, error: Exception) -> DataError:
    if not path.exists():
        return DataError(f"{path} cannot be read: No such file or directory")
    problem = str(error).splitlines()[0].rstrip(".")
    return DataError(f"{path} cannot be read as {form}: {problem}", "save or download it again")


_READERS = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
