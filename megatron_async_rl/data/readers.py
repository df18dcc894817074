"""Reads rows of datasets: JSONL, JSON, Parquet and Arrow files, and folders of them.

Rows are plain data (text, numbers, lists, mappings); columns of bytes, such as images, are left
out. Files are read in pieces, except JSON. Errors are DataErrors that begin with file and row.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from megatron_async_rl.data import columnar
from megatron_async_rl.errors import DataError
from megatron_async_rl.program import looked_up_in

_SUFFIXES = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")  # as the Hugging Face hub names a split's files
_COMPRESSED = "not JSON but compressed: decompress the file"
_OTHER_KINDS = (
    (codecs.BOM_UTF16_LE, "not UTF-8 but UTF-16: save the file as UTF-8"),
    (codecs.BOM_UTF16_BE, "not UTF-8 but UTF-16: save the file as UTF-8"),
    (b"\x1f\x8b", _COMPRESSED),
    (b"PK\x03\x04", _COMPRESSED),
    (b"\x28\xb5\x2f\xfd", _COMPRESSED),
    (b"PAR1", "not JSON but Parquet: name the file .parquet, or set `format` to parquet"),
    (
        b"version https://git-lfs",
        "not JSON but a pointer of git lfs: fetch the file (git lfs pull)",
    ),
    (b"\0", "not text: it has NUL bytes, of another encoding than UTF-8 or of a damaged disk"),
    (b"{\0", "not UTF-8 but UTF-16: save the file as UTF-8"),
)


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
    if not root.exists():
        raise DataError(f"{path} cannot be read: No such file or directory{looked_up_in(root)}")
    if not root.is_dir():
        if not root.is_file():
            problem = f"{path} is a pipe or device, and a dataset is read several times"
            raise DataError(problem, "save it as a file")
        if split is not None:
            raise DataError(f"{path} is one file, without split {split!r}", "remove `split`")
        return [(root, _format(root) if form == "auto" else form)]
    folder = _dataset_folder(root, split)
    if (folder / "state.json").exists():
        return [(file, "arrow") for file in _saved_files(folder)]
    suffixes = [s for s, f in _SUFFIXES.items() if form in ("auto", f) and s != ".json"]
    found = {suffix: files for suffix in suffixes if (files := _data_files(folder, suffix))}
    if len(found) > 1:
        raise DataError(
            f"{path} has {' and '.join(found)} files, and a dataset has one format",
            "set `format` to one of them, or name a file",
        )
    for suffix, files in found.items():
        chosen = _of_split(files, split, folder)
        _check_shards(chosen, folder)
        return [(file, _SUFFIXES[suffix]) for file in chosen]
    below = sorted({str(f.parent) for s in suffixes for f in folder.glob(f"*/*{s}")})
    raise DataError(
        f"{path} has no dataset in it" + (f", but {', '.join(below[:4])}" if below else ""),
        "name a file, a folder of .jsonl, .parquet or .arrow files, or one saved by save_to_disk",
    )


def as_plain(row: Any) -> dict[str, Any]:
    """Returns a row as plain data: dates and decimals as text, arrays as lists.

    Raises DataError.
    """
    if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
        raise DataError(f"a row is a {type(row).__name__}, must be a dict of columns by name")
    try:
        return msgspec.to_builtins(row, enc_hook=_number_or_list)
    except (TypeError, RecursionError) as e:
        raise DataError(f"a row has values that are not plain data: {e}") from None


def _number_or_list(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def decode_json(text: bytes) -> Any:
    """Returns the value of a JSON text. Raises DataError with the problem alone."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as e:
        problem = _kind_of(text) or f"not JSON: {e}"
        place = re.search(r"\(byte (\d+)\)", str(e))
        if place and text.startswith((b"NaN", b"Infinity"), int(place[1])):
            problem += " (NaN and Infinity are not in JSON: write null)"
        raise DataError(problem) from None
    except UnicodeDecodeError:
        raise DataError(_kind_of(text) or "not UTF-8: save the file as UTF-8") from None
    except RecursionError:
        raise DataError("nested too deeply") from None


def _kind_of(text: bytes) -> str:
    """Returns the problem of bytes that begin another kind of file, "" if unknown."""
    return next((problem for start, problem in _OTHER_KINDS if text.startswith(start)), "")


# ---- files of a folder


def _format(path: Path) -> str:
    form = _SUFFIXES.get(path.suffix.lower(), "jsonl")
    if form == "json":  # many JSONL files are named .json
        with path.open("rb") as file:
            start = file.read(256).removeprefix(codecs.BOM_UTF8).lstrip()
        return "json" if start.startswith(b"[") else "jsonl"
    return form


def _data_files(folder: Path, suffix: str) -> list[Path]:
    """Returns the files in order, without hidden ones."""
    return sorted(f for f in folder.glob(f"*{suffix}") if not f.name.startswith("."))


def _check_shards(files: list[Path], folder: Path) -> None:
    """Raises DataError if a file of a numbered series is missing."""
    series: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for file in files:
        if match := _SHARD.fullmatch(file.stem):
            series[match[1], match[3], file.suffix].add(int(match[2]))
    for (name, count, suffix), numbers in series.items():
        if missing := sorted(set(range(int(count))) - numbers):
            file_name = f"{name}-{missing[0]:05d}-of-{count}{suffix}"
            raise DataError(f"{folder / file_name} is missing", "copy or download the whole folder")


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
        if outside := [file for file in files if file.parent != folder]:
            raise ValueError(f"it names {outside[0]}, outside of its folder")
        if state.get("_indices_data_files"):
            raise DataError(
                f"{folder} holds a selection of rows", "save it again after flatten_indices()"
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
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
                line = line.removeprefix(codecs.BOM_UTF8)  # also of files put together
                if line.strip():
                    with _at(f"{path}, row {number}"):
                        row = _object(_decode_line(line, path))
                    yield number, row
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None


def _decode_line(line: bytes, path: Path) -> Any:
    """Returns the value in a line. Raises DataError, with a remedy for a file of another format."""
    try:
        return decode_json(line)
    except DataError as e:
        if not e.problem.startswith("not JSON: "):
            raise
        if path.suffix.lower() not in _SUFFIXES:
            known = ", ".join(_SUFFIXES)
            remedy = f"convert the file to one of {known}, or write a data.reader for it"
        elif line.strip() in (b"[", b"{"):
            remedy = "write each row in one line, or a list of rows in a file named .json"
        else:
            raise
        raise DataError(e.problem, remedy) from None


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
        raise DataError(f"{place}: {e.problem}", e.remedy) from None


def _plain(rows: _Rows) -> _Rows:
    for number, row in rows:
        yield number, as_plain(row)


_READERS = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": lambda path, names: _plain(columnar.read_parquet(path, names)),
    "arrow": lambda path, names: _plain(columnar.read_arrow(path, names)),
}
