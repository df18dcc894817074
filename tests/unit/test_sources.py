"""Sources of prompts: formats, fields, system prompts, limits, filters and a user's reader."""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_log_builders import sample_of_versions
from tiny_model import make_model

from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.datasets import SourceConfig
from megatron_async_rl.data import readers, success_rate
from megatron_async_rl.data.dataset import check_source, read_source, read_training
from megatron_async_rl.data.digests import changed_data, record_data
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.observability.sample_log import (
    SAMPLES_FILE,
    TrainedGroup,
    encode_line,
    sample_line,
)
from megatron_async_rl.protocol.types import Prompt

ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("model"))
    template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def make_config(model: Path, train: Any, **data: Any) -> Config:
    return load.from_tree(
        {
            "run": {"dir": str(model / "run"), "steps": 1},
            "model": {"path": str(model), "context_tokens": 60},
            "data": {"train": train} | data,
            "rollout": {"max_new_tokens": 30},
            "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
        }
    )


def training(config: Config, report: Callable[[str], None] = print) -> list[list[Prompt]]:
    found = read_training(config, Tokenizer(config.model.path), report)
    return [source.prompts for source in found]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_arrow(folder: Path, rows: list[dict[str, Any]], num_files: int = 1) -> Path:
    """Writes the files of Dataset.save_to_disk."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{num_files:05}.arrow" for i in range(num_files)]
    for i, name in enumerate(names):
        table = pa.Table.from_pylist(rows[i::num_files])
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as w,
        ):
            w.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def in_format(form: str, folder: Path) -> tuple[Path, str | None]:
    """Writes ROWS in a format and returns the source's path and split."""
    match form:
        case "jsonl":
            return write_jsonl(folder / "d.jsonl", ROWS), None
        case "json":
            (folder / "d.json").write_text(json.dumps(ROWS))
            return folder / "d.json", None
        case "JSONL named .json":
            return write_jsonl(folder / "d.json", ROWS), None
        case "parquet":
            return write_parquet(folder / "d.parquet", ROWS), None
        case "folder of parquet":
            (folder / "d").mkdir()
            write_parquet(folder / "d" / "train-00000-of-00002.parquet", ROWS[:3])
            write_parquet(folder / "d" / "train-00001-of-00002.parquet", ROWS[3:])
            write_parquet(folder / "d" / "test-00000-of-00001.parquet", ROWS[:1])
            return folder / "d", "train"
        case "saved dataset":
            return write_arrow(folder / "d", ROWS), None
        case "saved dataset dict":
            write_arrow(folder / "d" / "test", ROWS[:1])
            write_arrow(folder / "d" / "train", ROWS)
            return folder / "d", "train"
    raise AssertionError(form)


FORMATS = ["jsonl", "json", "JSONL named .json", "parquet", "folder of parquet"]
FORMATS += ["saved dataset", "saved dataset dict"]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_prompts(model: Path, tmp_path: Path, form: str) -> None:
    path, split = in_format(form, tmp_path)
    config = make_config(model, [{"path": str(path), "split": split}])
    [prompts] = training(config)
    assert [prompt.row for prompt in prompts] == ROWS
    assert [prompt.prompt_id for prompt in prompts] == ["1", "2", "3", "4", "5"]


def test_arrow_file_outside_a_saved_dataset_is_read(model: Path, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with (
        pa.OSFile(str(tmp_path / "d.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as w,
    ):
        w.write_table(table)
    [prompts] = training(make_config(model, str(tmp_path / "d.arrow")))
    assert [prompt.row for prompt in prompts] == ROWS


def test_columns_are_mapped_and_bytes_are_left_out(model: Path, tmp_path: Path) -> None:
    rows = [
        {"question": "1+1=", "verdict": {"truth": "2", "style": "rule"}, "image": {"bytes": b"x"}},
        {"question": "2+1=", "verdict": {"truth": "3", "style": "rule"}, "image": {"bytes": b"x"}},
    ]
    path = str(write_parquet(tmp_path / "d.parquet", rows))
    fields = {"prompt": "question", "answer": "verdict.truth"}
    [prompts] = training(make_config(model, [{"path": path, "fields": fields}]))
    assert [prompt.row for prompt in prompts] == [
        {"prompt": "1+1=", "answer": "2"},
        {"prompt": "2+1=", "answer": "3"},
    ]


def test_short_floats_are_read_as_they_were_written(model: Path, tmp_path: Path) -> None:
    nested = pa.struct([("truth", pa.float32()), ("all", pa.list_(pa.float16()))])
    columns = {
        "prompt": pa.array(["1+1=", "2+1="]),
        "answer": pa.array([0.1, 1e-8], pa.float32()),
        "model": pa.array([{"truth": 3.3, "all": [0.2, None]}, None], nested),
    }
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    [prompts] = training(make_config(model, str(tmp_path / "d.parquet")))
    assert [prompt.row["answer"] for prompt in prompts] == [0.1, 1e-8]
    assert prompts[0].row["model"] == {"truth": 3.3, "all": [0.2, None]}


def test_nested_value_is_null_where_its_column_is(model: Path, tmp_path: Path) -> None:
    nested = pa.array([None, {"unit": "cm"}], pa.struct([("unit", pa.string())]))
    columns = {"prompt": ["1+1=", "2+1="], "answer": ["2", "3"], "meta": nested}
    path = str(tmp_path / "d.parquet")
    pq.write_table(pa.table(columns), path)
    fields = {"prompt": "prompt", "answer": "answer", "unit": "meta.unit"}
    [prompts] = training(make_config(model, [{"path": path, "fields": fields}]))
    assert [prompt.row["unit"] for prompt in prompts] == [None, "cm"]


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.timestamp("us", tz="No/Zone")])
def test_time_that_python_cannot_hold_is_refused(
    model: Path, tmp_path: Path, kind: pa.DataType
) -> None:
    columns = {"prompt": ["1+1="], "answer": ["2"], "at": pa.array([1], kind)}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    path = str(tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet, row 1 .*cannot hold.*`fields`"):
        training(make_config(model, path))
    fields = {"prompt": "prompt", "answer": "answer"}
    [prompts] = training(make_config(model, [{"path": path, "fields": fields}]))
    assert len(prompts) == 1


def test_hidden_files_and_marks_of_utf8_are_left_out(model: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "._a.jsonl").write_bytes(b"\0\5\x16\7")  # as macOS leaves beside files
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    (tmp_path / "d" / "a.jsonl").write_bytes(b"".join(b"\xef\xbb\xbf" + line for line in lines))
    [prompts] = training(make_config(model, str(tmp_path / "d")))
    assert [prompt.row for prompt in prompts] == ROWS


def test_damaged_arrow_file_is_refused_or_read_and_never_ends_the_process(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "d", ROWS) / "data-00000-of-00001.arrow"
    original, draw, refused = path.read_bytes(), random.Random(3), 0
    for _ in range(60):
        content = bytearray(original)
        at = draw.randrange(8, len(content) - 4)
        content[at : at + 4] = draw.randbytes(4)
        path.write_bytes(content)
        try:
            list(readers.read([(path, "arrow")]))
        except DataError as e:
            refused += 1
            assert str(path) in str(e) and "\n" not in str(e)
    assert refused > 10


def test_tests_may_be_a_json_text(model: Path, tmp_path: Path) -> None:
    tests = [{"input": [1, "a"], "output": None}]
    row = {"prompt": "1", "tests": json.dumps(tests), "function": "f"}
    path = write_parquet(tmp_path / "d.parquet", [row])
    tree = load.dump(make_config(model, str(path)))
    (tmp_path / "c.yaml").write_text(tree)
    config = load.load(tmp_path / "c.yaml", ["reward.function=code"])
    assert training(config)[0][0].row["tests"] == tests


@pytest.mark.parametrize("form", ["text", "messages", "own system message"])
def test_system_prompt_is_rendered_first(model: Path, tmp_path: Path, form: str) -> None:
    user = {"role": "user", "content": "1+1="}
    prompts: dict[str, Any] = {"text": "1+1=", "messages": [user]}
    prompts["own system message"] = [{"role": "system", "content": "k"}, user]
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": prompts[form], "answer": "2"}])
    config = make_config(model, [{"path": str(path), "system_prompt": "cab"}])
    [[prompt]] = training(config)
    text = Tokenizer(model).decode(prompt.ids)
    assert text.replace("<|unk|>", "") == "cab;1+1=;"  # s and u are not in the vocabulary
    assert prompt.row["prompt"] == [{"role": "system", "content": "cab"}, user]


def test_prompts_outside_the_limits_are_left_out_and_counted(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": "1" * n, "answer": "1"} for n in (1, 2, 3, 4, 5)]
    )
    limits = {"min_prompt_tokens": 2, "max_prompt_tokens": 3}
    said: list[str] = []
    [prompts] = training(make_config(model, [{"path": str(path)} | limits]), said.append)
    assert [len(prompt.ids) for prompt in prompts] == [2, 3]
    source = f"of 5 prompts of data.train[0].path = {path}"
    assert said == [
        f"1 {source} have fewer tokens than min_prompt_tokens = 2",
        f"2 {source} have more tokens than max_prompt_tokens = 3",
    ]
    with pytest.raises(DataError, match="none is left"):
        training(make_config(model, [{"path": str(path), "min_prompt_tokens": 9}]))


def test_preflight_counts_the_prompts_beyond_max_prompt_tokens(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "1" * n, "answer": "1"} for n in (1, 2, 3, 4, 5)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    config = make_config(model, [{"path": str(path), "max_prompt_tokens": 3}])
    [source], said = config.data.train, list[str]()
    assert check_source(source, "data.train[0]", config, said.append) == 5  # type: ignore[arg-type]
    assert said == [
        f"2 of 5 prompts of data.train[0] = {path} have more tokens than max_prompt_tokens = 3"
    ]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"path": "d.parquet", "fields": {"prompt": "q"}}, r"d.parquet, row 1: no column `q`; "),
        ({"path": "d.parquet", "fields": {"prompt": "q"}}, r"the columns are: prompt, answer"),
        ({"path": "d.jsonl", "fields": {"prompt": "a.b"}}, r"d.jsonl, row 1: no column `a.b`; "),
        ({"path": "d.jsonl", "fields": {"prompt": "prompt"}}, "no `answer`.*name the column"),
        ({"path": "damaged.parquet"}, "cannot be read as Parquet: "),
        ({"path": "damaged.arrow"}, "cannot be read as Arrow: "),
        ({"path": "none.parquet"}, "none.parquet cannot be read: No such file"),
        ({"path": "none"}, "none cannot be read: No such file"),
        ({"path": "empty.parquet"}, "empty.parquet has no rows"),
        ({"path": "folder"}, "folder has no dataset in it"),
        ({"path": "dict"}, "dict has several splits; set `split` to one of test, train"),
        ({"path": "dict", "split": "dev"}, "dict has no split 'dev'"),
        ({"path": "d.csv"}, r"row 1: not JSON: .* convert .* \.arrow, or write a data\.reader"),
        ({"path": "pretty.jsonl"}, "row 1: not JSON: .* write each row in one line, or a list of"),
        ({"path": "nan.jsonl"}, r"row 1: not JSON: .*NaN and Infinity are not in JSON: write null"),
        ({"path": "torn.jsonl"}, "row 1: not JSON: Input data was truncated; "),
        ({"path": "other.jsonl"}, r"no `prompt`; the columns are: question, a\.b; name .* fields:"),
        ({"path": "null.jsonl"}, "row 1: `prompt` is None, must be a text or a list of messages"),
        ({"path": "roles.jsonl"}, "row 1: `prompt` is a list, so its entries must be messages"),
        ({"path": "words.jsonl"}, "row 1: the tokenizer in .* knows only 1 of the prompt's 3 tok"),
        ({"path": "bytes.parquet", "fields": {"prompt": "q"}}, "the column `q` holds bytes; conv"),
        ({"path": "other.jsonl", "fields": {"prompt": "a.c"}}, r"the columns are: question, a\.b"),
        ({"path": "d.jsonl", "split": "train"}, "d.jsonl is one file, without split 'train'; rem"),
        ({"path": "torn"}, "data-00000-of-00001.arrow is missing"),
        ({"path": "shards"}, "shards has several splits; set `split` to one of test, train"),
        ({"path": "named"}, "named has several splits; set `split` to one of test, train"),
        ({"path": "formats"}, "formats has .jsonl and .parquet files, and a dataset has one"),
        ({"path": "series"}, "series/train-00001-of-00003.parquet is missing"),
        ({"path": "above"}, "above has no dataset in it, but above/data; name a file"),
        ({"path": "outside"}, "outside/state.json cannot be read: it names /dev/zero, outside of"),
        ({"path": "selection"}, r"selection holds a selection of rows; .*flatten_indices"),
        ({"path": "/dev/null"}, "null is a pipe or device, and a dataset is read several times"),
        ({"path": "d.gz"}, "d.gz, row 1: not JSON but compressed: decompress the file"),
        ({"path": "pointer.jsonl"}, "row 1: not JSON but a pointer of git lfs: fetch the file"),
        ({"path": "parquet.jsonl"}, "row 1: not JSON but Parquet: name the file .parquet"),
        ({"path": "wide.jsonl"}, "row 1: not UTF-8 but UTF-16: save the file as UTF-8"),
        ({"path": "zeros.jsonl"}, "row 2: not text: it has NUL bytes"),
        ({"path": "ids.jsonl"}, r"row 2: duplicate id '1' \(rows without an id have their number"),
    ],
)
def test_unusable_source_error_is_one_line_with_file_and_remedy(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: dict[str, Any],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("d.jsonl"), ROWS)
    write_parquet(Path("d.parquet"), ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS[:1])[:0], "empty.parquet")
    pq.write_table(pa.table({"q": [b"1+1="]}), "bytes.parquet")
    for name, text in {
        "d.csv": "question,solution\n1+1=,2",
        "pretty.jsonl": '{\n"prompt": "1"}',
        "nan.jsonl": '{"prompt": "1", "answer": NaN}',
        "torn.jsonl": '{"prompt": "NaN"',
        "other.jsonl": '{"question": "1", "a": {"b": 2}}',
        "null.jsonl": '{"prompt": null}',
        "roles.jsonl": '{"prompt": [{"from": "human", "value": "1"}], "answer": "1"}',
        "words.jsonl": '{"prompt": "W1W", "answer": "1"}',
    }.items():
        Path(name).write_text(text)
    for name in ("damaged.parquet", "damaged.arrow"):
        Path(name).write_bytes(b"PAR1 and no more")
    Path("folder").mkdir()
    for split in ("train", "test"):
        write_arrow(Path("dict") / split, ROWS)
    (write_arrow(Path("torn"), ROWS) / "data-00000-of-00001.arrow").unlink()
    for name in ("shards", "named"):
        Path(name).mkdir()
    for split in ("train", "test"):
        write_parquet(Path(f"shards/{split}-00000-of-00001.parquet"), ROWS)
        write_jsonl(Path(f"named/{split}.jsonl"), ROWS)
    for name, content in {
        "formats/a.jsonl": b"", "formats/b.parquet": b"", "above/data/a.jsonl": b"",
        "series/train-00000-of-00003.parquet": b"", "series/train-00002-of-00003.parquet": b"",
        "outside/state.json": b'{"_data_files": [{"filename": "/dev/zero"}]}',
        "selection/state.json": b'{"_data_files": [], "_indices_data_files": [{}]}',
        "d.gz": gzip.compress(b"{}"), "pointer.jsonl": b"version https://git-lfs.github.com",
        "parquet.jsonl": b"PAR1", "wide.jsonl": '{"prompt": "1"}'.encode("utf-16-le"),
        "zeros.jsonl": json.dumps(ROWS[0]).encode() + b"\n" + bytes(9),
        "ids.jsonl": "\n".join(json.dumps(ROWS[0] | new) for new in ({}, {"id": 1})).encode(),
    }.items():  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    config = make_config(model, [source])
    with pytest.raises(DataError, match=problem) as error:
        check_source(config.data.train[0], "data.train[0].path", config)  # type: ignore[arg-type]
    assert "\n" not in str(error.value) and "; " in str(error.value)
    assert str(error.value).startswith(f"data.train[0].path = {source['path']}")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"train": [{"path": "a", "weight": 0}]}, r"data.train\[0\].weight = 0: expected "),
        ({"train": [{"path": "a"}, {"path": "b", "weight": -1.0}]}, r"data.train\[1\].weight = -1"),
        ({"train": []}, r"data.train = \[\]: expected a list of length >= 1"),
        ({"train": ["a"]}, r"data.train\[0\] = 'a': expected a mapping, .*`path: "),
        ({"train": [{"path": "a", "colums": {}}]}, "colums is not a setting; did you mean"),
        ({"train": [{"weight": 1.0}]}, r"data.train\[0\].path is not set"),
        ({"train": [{"path": "a", "format": "csv"}]}, "expected one of 'auto', 'jsonl'"),
        ({"train": [{"path": "a", "fields": {"prompt": 1}}]}, r"data.train\[0\].fields = "),
        (
            {"train": [{"path": "a", "min_prompt_tokens": 5, "max_prompt_tokens": 4}]},
            r"data.train\[0\].max_prompt_tokens = 4 is less than",
        ),
        ({"train": "a", "filter": {"min": 0.9, "max": 0.1}}, "data.filter.min = 0.9 is more than"),
    ],
)
def test_wrong_setting_of_a_source_is_named(
    model: Path, data: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_config(model, **data)


def test_sources_survive_a_dump(model: Path, tmp_path: Path) -> None:
    sources = [{"path": "a", "weight": 2.5, "fields": {"prompt": "q"}}, {"path": "b"}]
    config = make_config(model, sources)
    (tmp_path / "config.yaml").write_text(load.dump(config))
    assert load.load(tmp_path / "config.yaml") == config


def test_digests_cover_all_files_of_all_sources(model: Path, tmp_path: Path) -> None:
    saved = write_arrow(tmp_path / "saved", ROWS, num_files=2)
    single = write_jsonl(tmp_path / "d.jsonl", ROWS)
    config = make_config(model, [{"path": str(single)}, {"path": str(saved)}])
    record_data(tmp_path, config)
    assert changed_data(tmp_path, config) == ""
    shard = saved / "data-00001-of-00002.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"4", b"5"))
    assert changed_data(tmp_path, config).startswith(f"data.train[1].path = {saved} has other")
    shard.write_bytes(content)
    write_jsonl(single, ROWS[:4])
    assert changed_data(tmp_path, config).startswith(f"data.train[0].path = {single} has other")


READER = """
def read(path, source):
    for number, line in enumerate(open(path), 1):
        if "!" in line:
            raise ValueError("bad line")
        yield {"prompt": line.strip() + source.split, "answer": number}

def listed(path, source):
    return [["no dict"]]

def opaque(path, source):
    return [{"prompt": object()}]

def exits(path, source):
    raise SystemExit("no file")

def arrays(path, source):
    import numpy as np
    return [{"prompt": np.str_("1+1="), "answer": np.int64(2), "all": np.arange(2)}]
"""


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_reader.py").write_text(READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_reader", None)


def test_rows_of_an_own_reader_become_prompts(model: Path, reader: Path) -> None:
    (reader / "d.txt").write_text("1+1\n2+2\n")
    source = {"path": str(reader / "d.txt"), "split": "="}
    [prompts] = training(make_config(model, [source], reader="own_reader:read"))
    assert [prompt.row["prompt"] for prompt in prompts] == ["1+1=", "2+2="]
    source = {"format": "jsonl", "path": str(write_jsonl(reader / "d.jsonl", ROWS))}
    [prompts] = training(make_config(model, [source], reader="own_reader:read"))
    assert [prompt.row for prompt in prompts] == ROWS  # a format is read by its own reader


def test_arrays_of_an_own_reader_become_plain_data(model: Path, reader: Path) -> None:
    config = make_config(model, [{"path": "."}], reader="own_reader:arrays")
    [[prompt]] = training(config)
    assert prompt.row == {"prompt": "1+1=", "answer": 2, "all": [0, 1]}


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("read", "row 2: ValueError: bad line; correct data.reader = own_reader:read"),
        ("listed", "row 1: a row is a list, must be a dict of columns by name"),
        ("opaque", "row 1: a row has values that are not plain data"),
        ("exits", "row 1: SystemExit: no file; correct data.reader = own_reader:exits"),
        ("absent", "data.reader = 'own_reader:absent' cannot be loaded"),
    ],
)
def test_failing_reader_error_names_the_row(
    model: Path, reader: Path, function: str, problem: str
) -> None:
    (reader / "d.txt").write_text("1+1\n!\n")
    source = {"path": str(reader / "d.txt"), "split": "="}
    config = make_config(model, [source], reader=f"own_reader:{function}")
    with pytest.raises((ConfigError, DataError), match=re.escape(problem)) as error:
        training(config)
    assert "\n" not in str(error.value)


def earlier_run(folder: Path, config: Config, rewards: dict[str, list[float]]) -> Path:
    """Writes the parts of a run that data.filter reads."""
    folder.mkdir()
    (folder / "config.yaml").write_text(load.dump(config))
    record_data(folder, config)
    with (folder / SAMPLES_FILE).open("wb") as file:
        for group_id, (prompt_id, values) in enumerate(rewards.items()):
            samples = [sample_of_versions((0, 2)) for _ in values]
            group = TrainedGroup(group_id, prompt_id, samples, values, [0.0] * len(values))
            for index in range(len(values)):
                file.write(encode_line(sample_line(0, group, index, with_tokens=False)))
    return folder


def test_prompts_outside_the_success_rates_of_an_earlier_run_are_left_out(
    model: Path, tmp_path: Path
) -> None:
    first = make_config(model, str(write_jsonl(tmp_path / "first.jsonl", ROWS)))
    rewards = {"1": [0.0, 0.0], "2": [1.0, 0.0], "3": [1.0, 1.0]}
    run = earlier_run(tmp_path / "run", first, rewards)
    # the same prompts in another order, as chats: ids and form differ, texts do not
    rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": "1"} for r in ROWS]
    path = write_jsonl(tmp_path / "second.jsonl", rows[::-1])
    band = {"run": str(run), "min": 0.1, "max": 0.9}
    config = make_config(model, str(path), filter=band)
    said: list[str] = []
    [prompts] = training(config, said.append)
    kept = [prompt.row["prompt"][0]["content"] for prompt in prompts]
    assert kept == ["4+1=", "3+1=", "1+1="]
    assert said == [
        "data.filter leaves out 1 prompts with a success rate below 0.1 and 1 above 0.9 of 5 in "
        f"data.train = {path}; 2 were not sampled in {run}"
    ]


def test_success_rates_are_kept_with_the_run_that_uses_them(model: Path, tmp_path: Path) -> None:
    first = make_config(model, str(write_jsonl(tmp_path / "first.jsonl", ROWS)))
    run = earlier_run(tmp_path / "run", first, {"1": [0.0]})
    tree = make_config(model, first.data.train, filter={"run": str(run), "min": 0.1})
    (tmp_path / "c.yaml").write_text(load.dump(tree))
    (tmp_path / "new").mkdir()
    config = load.load(tmp_path / "c.yaml", [f"run.dir={tmp_path / 'new'}"])
    success_rate.record(config.run_dir, config)
    (run / SAMPLES_FILE).write_text("")  # the earlier run goes on
    assert len(training(config)[0]) == 4
    success_rate.record(config.run_dir, config)
    assert success_rate.recorded(config) == {"0+1=": 0.0}
    other = earlier_run(tmp_path / "other", first, {"2": [1.0]})
    config = load.load(
        tmp_path / "c.yaml", [f"run.dir={config.run_dir}", f"data.filter.run={other}"]
    )
    assert success_rate.recorded(config) == {"1+1=": 1.0}  # rates of another run do not count


@pytest.mark.parametrize("damage", ["no run", "no samples", "other data", "none left"])
def test_unusable_filter_error_names_the_run(model: Path, tmp_path: Path, damage: str) -> None:
    path = write_jsonl(tmp_path / "first.jsonl", ROWS)
    first = make_config(model, str(path))
    run = earlier_run(tmp_path / "run", first, {str(n): [0.0] for n in range(1, 6)})
    problem = {"no run": "has no config.yaml", "no samples": "has no samples.jsonl"}.get(damage)
    if damage == "no run":
        run = tmp_path / "nowhere"
    elif damage == "no samples":
        (run / SAMPLES_FILE).unlink()
    elif damage == "other data":
        write_jsonl(path, ROWS[:2])
        problem = "has other content"
    config = make_config(model, str(path), filter={"run": str(run), "min": 0.1})
    with pytest.raises((ConfigError, DataError), match=problem or "none is left") as error:
        training(config)
    assert str(run) in str(error.value) and "\n" not in str(error.value)


def test_ids_of_several_sources_are_distinct(model: Path, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "d.jsonl", ROWS[:2]))
    found = training(make_config(model, [{"path": path}, {"path": path}]))
    assert [prompt.prompt_id for prompts in found for prompt in prompts] == [
        "0:1",
        "0:2",
        "1:1",
        "1:2",
    ]


def test_evaluation_set_is_read_as_a_source(model: Path, tmp_path: Path) -> None:
    config = make_config(model, "unused")
    path = str(write_parquet(tmp_path / "d.parquet", ROWS))
    prompts = read_source(
        SourceConfig(path=path), "evaluation.sets.a.path", config, Tokenizer(model)
    )
    assert [prompt.row for prompt in prompts] == ROWS
