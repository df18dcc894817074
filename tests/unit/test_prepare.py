"""`prepare`: rows of published datasets become ours, or are dropped with a reason."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paths import ROOT

from megatron_async_rl import __main__ as command_line
from megatron_async_rl.data import math_rows
from megatron_async_rl.data.code_tests import read_tests
from megatron_async_rl.data.prepare import livecodebench, pipeline
from megatron_async_rl.data.prepare.columns import Unusable
from megatron_async_rl.data.prepare.kinds import KINDS
from megatron_async_rl.data.prepare.pipeline import Options, Report
from megatron_async_rl.errors import ConfigError, DataError

LEETCODE_TESTS = [
    {"input": '[1, 2]\n"a"', "output": "[3]", "testtype": "functional"},
    {"input": '[]\n""', "output": "[0]", "testtype": "functional"},
]


def prepare(kind: str, folder: Path, *rows: dict[str, Any], **options: Any) -> Report:
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pipeline.prepare(kind, str(source), folder / "out.jsonl", Options(**options), print)


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def pickle_of(text: str) -> bytes:
    """Returns a pickle of protocol 4, as pickle.dumps writes a text of 256 bytes or more."""
    encoded = text.encode()
    body = b"X" + len(encoded).to_bytes(4, "little") + encoded + b"\x94."
    return b"\x80\x04\x95" + len(body).to_bytes(8, "little") + body


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gsm8k": (
        {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 1,072"},
        {"prompt": "How many?", "answer": "1,072"},
    ),
    "math": (
        {
            "problem": "Find $x$.",
            "solution": "So $\\boxed{1}$, no: $\\boxed{\\frac{1}{2}}$.",
            "level": "Level 5",
            "type": "Algebra",
        },
        {"prompt": "Find $x$.", "answer": "\\frac{1}{2}", "level": "Level 5", "type": "Algebra"},
    ),
    "aime": (
        {"id": 60, "problem": "Find it.", "answer": "073", "solution": "s", "year": "2024"},
        {"id": "aime/60", "prompt": "Find it.", "answer": "073", "year": "2024"},
    ),
    "amc": (
        {"id": 0, "problem": "Find it.", "answer": 27.0, "question": "Find it."},
        {"id": "amc/0", "prompt": "Find it.", "answer": "27"},
    ),
    "deepscaler": (
        {"problem": "Find it.", "answer": "-\\frac{2}{3}", "solution": ""},
        {"prompt": "Find it.", "answer": "-\\frac{2}{3}"},
    ),
    "apps": (
        {
            "problem_id": 7,
            "question": "Add two numbers.",
            "solutions": '["print(1)"]',
            "input_output": json.dumps({"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", "7"]}),
            "difficulty": "interview",
            "starter_code": "",
        },
        {
            "id": "apps/7",
            "prompt": "Add two numbers.",
            "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "3\n4", "output": "7"}],
            "difficulty": "interview",
        },
    ),
    "taco": (
        {
            "question": "Double it.",
            "input_output": json.dumps(
                {"fn_name": "double", "inputs": [[1], ["a"]], "outputs": [[2], ["aa"]]}
            ),
            "starter_code": "def double(x):\n\t",
            "difficulty": "EASY",
        },
        {
            "prompt": "Double it.\n\nComplete this code:\n\n```python\ndef double(x):\n```",
            "tests": [{"input": [1], "output": 2}, {"input": ["a"], "output": "aa"}],
            "difficulty": "EASY",
            "function": "double",
        },
    ),
    "deepcoder": (
        {
            "problem": "Add.",
            "tests": json.dumps(
                [{"input": "1 2", "output": "3", "type": "stdin_stdout", "fn_name": None}]
            ),
        },
        {"prompt": "Add.", "tests": [{"input": "1 2", "output": "3"}]},
    ),
    "codecontests": (
        {
            "name": "1_A. Add",
            "description": "Add.",
            "public_tests": {"input": ["1 2"], "output": ["3"]},
            "private_tests": {"input": ["1 2", "2 2"], "output": ["3", "4"]},
            "generated_tests": {"input": [], "output": []},
            "cf_rating": 800,
            "time_limit": {"seconds": 1, "nanos": 500000000},
            "input_file": "",
            "solutions": {"language": [3], "solution": ["x"]},
        },
        {
            "id": "codecontests/1_A. Add",
            "prompt": "Add.",
            "tests": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}],
            "name": "1_A. Add",
            "rating": 800,
            "time_limit_s": 1.5,
        },
    ),
    "livecodebench": (
        {
            "question_id": "1873_A",
            "question_content": "Sum.",
            "platform": "leetcode",
            "contest_date": "2024-01-01T00:00:00",
            "starter_code": "class Solution:\n    def total(self, a, b):\n        ",
            "public_test_cases": json.dumps(LEETCODE_TESTS[:1]),
            "private_test_cases": packed(pickle_of(json.dumps(LEETCODE_TESTS))),
            "metadata": '{"func_name": "total"}',
        },
        {
            "id": "livecodebench/1873_A",
            "prompt": "Sum.\n\nComplete this code:\n\n```python\nclass Solution:\n"
            "    def total(self, a, b):\n```",
            "tests": [{"input": [[1, 2], "a"], "output": [3]}, {"input": [[], ""], "output": [0]}],
            "platform": "leetcode",
            "contest_date": "2024-01-01T00:00:00",
            "function": "total",
        },
    ),
    "codeforces": (
        {
            "id": "1/A",
            "title": "Add",
            "description": "Add.",
            "input_format": "Two numbers.",
            "output_format": "Their sum.",
            "examples": [{"input": "1 2", "output": "3"}],
            "official_tests": [{"input": "4 5", "output": "9"}],
            "rating": 1200,
            "time_limit": 2.0,
            "input_mode": "stdio",
        },
        {
            "id": "codeforces/1/A",
            "prompt": "Add.\n\nInput\n\nTwo numbers.\n\nOutput\n\nTheir sum.\n\n"
            "Example\n\nInput:\n1 2\nOutput:\n3",
            "tests": [{"input": "4 5", "output": "9"}],
            "title": "Add",
            "rating": 1200,
            "time_limit_s": 2.0,
        },
    ),
}


def test_every_kind_has_an_example() -> None:
    assert PUBLISHED.keys() == KINDS.keys()


def test_documentation_names_every_kind() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    assert [
        kind for kind in KINDS if f"| `{kind}`" not in page and f", `{kind}` |" not in page
    ] == []


@pytest.mark.parametrize("kind", KINDS)
def test_published_row_becomes_a_row_that_the_reward_reads(kind: str, tmp_path: Path) -> None:
    published, expected = PUBLISHED[kind]
    report = prepare(kind, tmp_path, published)
    [row] = rows_in(tmp_path / "out.jsonl")
    assert row == {"id": f"{kind}/1"} | expected
    assert (report.read, report.kept, report.dropped) == (1, 1, {})
    if KINDS[kind].reward == "math":
        assert math_rows.read_answer(row) == expected["answer"]
    else:
        assert len(read_tests(row).inputs) == len(expected["tests"])


@pytest.mark.parametrize("kind", ["codecontests", "codeforces", "gsm8k"])
def test_published_parquet_with_nested_columns_is_read(kind: str, tmp_path: Path) -> None:
    published, expected = PUBLISHED[kind]
    pq.write_table(pa.Table.from_pylist([published]), tmp_path / "in.parquet")
    pipeline.prepare(kind, str(tmp_path / "in.parquet"), tmp_path / "o.jsonl", Options(), print)
    assert rows_in(tmp_path / "o.jsonl") == [{"id": f"{kind}/1"} | expected]


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gsm8k", {"answer": "It is 72."}, "no answer"),
        ("gsm8k", {"answer": "####  "}, "no answer"),
        ("gsm8k", {"question": " "}, "no problem"),
        ("math", {"solution": "So it is 1."}, "no answer"),
        ("math", {"problem": "See ![](a.png)."}, "needs an image"),
        ("math", {"problem": "<image> Find x."}, "needs an image"),
        ("math", {"answer": "Not provided."}, "no answer"),
        ("math", {"answer": "See the solution."}, "answer is a proof"),
        (
            "math",
            {"problem": "Prove that $a>b$.", "answer": "It follows from the lemma"},
            "answer is a proof",
        ),
        ("math", {"answer": " ".join(["because"] * 13)}, "answer is prose"),
        ("apps", {"input_output": ""}, "no tests"),
        ("apps", {"input_output": "{"}, "tests are not JSON"),
        ("apps", {"input_output": '{"inputs": [], "outputs": []}'}, "no tests"),
        (
            "apps",
            {"input_output": '{"inputs": ["1"], "outputs": []}'},
            "inputs and outputs differ in number",
        ),
        (
            "apps",
            {"input_output": '{"fn_name": "f", "inputs": [[{"1": 2}]], "outputs": [1]}'},
            "arguments with integer keys",
        ),
        (
            "apps",
            {"input_output": f'{{"fn_name": "f", "inputs": [[1]], "outputs": [{2**70}]}}'},
            "numbers of more than 64 bits",
        ),
        ("taco", {"picture_num": "2"}, "needs an image"),
        ("deepcoder", {"tests": '[{"input": 1, "output": 2}]'}, "tests of another form"),
        ("deepcoder", {"tests": '["1"]'}, "tests of another form"),
        (
            "deepcoder",
            {"tests": '[{"input": "1", "output": "2", "testtype": "functional"}]'},
            "tests call a function without a name",
        ),
        ("codecontests", {"input_file": "a.in"}, "reads or writes a file"),
        (
            "codecontests",
            {"description": "If there are several answers, print any of them."},
            "needs a checker",
        ),
        ("codeforces", {"generated_checker": "import sys"}, "needs a checker"),
        ("codeforces", {"interaction_format": "Ask."}, "interactive"),
        ("codeforces", {"input_mode": "file"}, "reads or writes a file"),
        ("codeforces", {"examples": [], "official_tests": []}, "no tests"),
        ("livecodebench", {"private_test_cases": "no base64!"}, "private tests are damaged"),
        ("livecodebench", {"private_test_cases": "YWJj"}, "private tests are damaged"),
    ],
)
def test_unusable_row_is_counted_under_its_reason(
    kind: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    good = PUBLISHED[kind][0]
    report = prepare(kind, tmp_path, good, {**good, "id": 9, "problem_id": 9, **changes})
    assert (report.read, report.kept, report.dropped) == (2, 1, {reason: 1})


@pytest.mark.parametrize(
    "text",
    ["Find any even number of vertices.", "Do not print any extra spaces. For any x, sum."],
)
def test_word_any_alone_needs_no_checker(text: str, tmp_path: Path) -> None:
    row = PUBLISHED["codecontests"][0] | {"description": text}
    dropped = "Find any" in text
    if dropped:
        with pytest.raises(DataError, match="1 needs a checker"):
            prepare("codecontests", tmp_path, row)
    else:
        assert prepare("codecontests", tmp_path, row).kept == 1


HOSTILE = {
    "global": b"cos\nsystem\n(S'echo'\ntR.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04echo\x85R.",
    "list": b"\x80\x04]\x8c\x01aa.",
    "two texts": b"\x80\x04\x8c\x01a\x8c\x01b.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"\x80\x04\x8c\x01aQ.",
    "no end": b"\x80\x04\x8c\x01a",
    "unknown opcode": b"\xff\xff",
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_pickle_of_anything_but_a_text_is_refused(name: str) -> None:
    with pytest.raises(Unusable, match="private tests are"):
        livecodebench.pickled_text(HOSTILE[name])


@pytest.mark.parametrize("text", ["", "[]", "é" * 300, "\U0001f600\n"])
def test_pickled_text_is_read(text: str) -> None:
    assert livecodebench.pickled_text(pickle_of(text)) == text


def test_private_tests_that_decompress_beyond_the_limit_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(livecodebench, "MAX_TEST_BYTES", 1000)
    good = PUBLISHED["livecodebench"][0]
    bomb = good | {"private_test_cases": packed(pickle_of("[" + " " * 10_000 + "]"))}
    assert list(
        prepare("livecodebench", tmp_path, bomb | {"question_content": "b"}, good).dropped
    ) == ["private tests are damaged or larger than 512 MiB"]


def test_duplicates_are_dropped_whatever_their_layout(tmp_path: Path) -> None:
    problems = ["Find $\\frac12$ of  X.", "find $ \\dfrac12 $ of x.", "Find \\frac12 of X."]
    rows = [{"problem": p, "answer": a} for p, a in zip(problems, ("1", "1", "2"), strict=True)]
    report = prepare("math", tmp_path, *rows, {"problem": "Find $-\\frac12$ of X.", "answer": "1"})
    assert report.dropped == {"duplicate": 1, "duplicate with another answer": 1}
    assert [row["id"] for row in rows_in(tmp_path / "out.jsonl")] == ["math/1", "math/4"]


WORDS = "alice has seven apples and gives two of them to bob how many does she keep"


def test_rows_that_share_words_with_an_evaluation_set_are_dropped(tmp_path: Path) -> None:
    evaluation = tmp_path / "eval.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "Two plus two?"}]
    evaluation.write_text(
        json.dumps({"question": WORDS.title(), "answer": "5"})
        + "\n"
        + json.dumps({"prompt": chat, "answer": "4"})
        + "\n"
    )
    words = WORDS.split()
    problems = {
        "whole": f"Today, {WORDS}?",
        "13 words": " ".join(["Now:", *words[2:15], "left?"]),
        "12 words": " ".join(["Now:", *words[2:14], "left?"]),
        "short": "two PLUS two",
        "short inside": "two plus two plus two",
    }
    rows = [{"id": name, "problem": text, "answer": "1"} for name, text in problems.items()]
    report = prepare("math", tmp_path, *rows, evaluation_sets=(str(evaluation),))
    assert [row["id"] for row in rows_in(tmp_path / "out.jsonl")] == [
        "math/12 words",
        "math/short inside",
    ]
    assert report.dropped == {"in an evaluation set": 3}
    found = {c.row: (c.evaluation, c.words) for c in report.contaminated}
    assert found["math/short"] == (f"{evaluation}, row 2", "two plus two")
    assert found["math/13 words"] == (f"{evaluation}, row 1", " ".join(words[2:15]))
    report = prepare("math", tmp_path, *rows, evaluation_sets=(str(evaluation),), ngram=12)
    assert report.dropped == {"in an evaluation set": 4}


def test_starter_code_and_examples_do_not_make_a_row_contaminated(tmp_path: Path) -> None:
    published = PUBLISHED["livecodebench"][0]
    starter = "class Solution:\n    def f(self, " + ", ".join(f"a{n}: int" for n in range(9)) + "):"
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(json.dumps({"prompt": f"Product.\n\nComplete this code:\n\n{starter}"}))
    row = published | {"starter_code": starter}
    assert prepare("livecodebench", tmp_path, row, evaluation_sets=(str(evaluation),)).kept == 1


def test_output_is_deterministic_and_described_by_its_report(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}+1?", "answer": f"#### {n + 1}"} for n in range(40)]
    first = prepare("gsm8k", tmp_path, *rows, {"question": "", "answer": ""}, num_validation=10)
    content = [(tmp_path / name).read_bytes() for name in ("out.jsonl", "out.val.jsonl")]
    assert (
        prepare("gsm8k", tmp_path, *rows, {"question": "", "answer": ""}, num_validation=10)
        == first
    )
    assert [(tmp_path / n).read_bytes() for n in ("out.jsonl", "out.val.jsonl")] == content
    train, validation = rows_in(tmp_path / "out.jsonl"), rows_in(tmp_path / "out.val.jsonl")
    assert (len(train), len(validation)) == (30, 10)
    assert len({row["prompt"] for row in train + validation}) == 40
    assert validation != train[:10]
    written = msgspec.json.decode((tmp_path / "out.report.json").read_bytes(), type=Report)
    assert written == first
    assert (written.read, written.kept, written.validation) == (41, 30, 10)
    assert written.lengths == {"prompt characters": {"min": 12, "median": 13, "p95": 13, "max": 13}}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"in.jsonl", "out.jsonl", "out.val.jsonl", "out.report.json"}
    # validation rows do not depend on the order of the input
    prepare("gsm8k", tmp_path, *rows[::-1], num_validation=10)
    again = {row["prompt"] for row in rows_in(tmp_path / "out.val.jsonl")}
    assert again == {row["prompt"] for row in validation}


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        (  # PrimeIntellect: typed, arguments as lists, each result in its own list
            [{"type": "function_call", "fn_name": "f", "input": [[1, 2]], "output": [3]}],
            {"function": "f", "tests": [{"input": [[1, 2]], "output": 3}]},
        ),
        (  # LiveCodeBench: a JSON text per argument
            [{"input": "[1]\n2", "output": "[3]", "testtype": "functional"}],
            {"function": "g", "tests": [{"input": [[1], 2], "output": [3]}]},
        ),
        (  # TACO: as published by it
            {"inputs": [["a"], ["b"]], "outputs": [["x", "y"], ["z"]], "fn_name": "h"},
            {
                "function": "h",
                "tests": [
                    {"input": ["a"], "output": ["x", "y"]},
                    {"input": ["b"], "output": ["z"]},
                ],
            },
        ),
        ({"inputs": ["1\n"], "outputs": ["2\n"]}, {"tests": [{"input": "1\n", "output": "2\n"}]}),
    ],
)
def test_tests_of_deepcoder_are_read_in_each_of_their_forms(
    tests: Any, expected: dict[str, Any], tmp_path: Path
) -> None:
    row = {"problem": "p", "tests": json.dumps(tests), "metadata": '{"func_name": "g"}'}
    prepare("deepcoder", tmp_path, row)
    [made] = rows_in(tmp_path / "out.jsonl")
    assert {name: made[name] for name in expected} == expected
    assert ("function" in made) == ("function" in expected)


def test_tests_beyond_the_limit_are_left_out_and_counted(tmp_path: Path) -> None:
    report = prepare("apps", tmp_path, PUBLISHED["apps"][0], max_tests=1)
    assert len(rows_in(tmp_path / "out.jsonl")[0]["tests"]) == 1
    assert report.left_out_tests == 1


def test_progress_is_said_when_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "PROGRESS_S", 0.0)
    (tmp_path / "in.jsonl").write_text(json.dumps(PUBLISHED["gsm8k"][0]))
    said: list[str] = []
    source = str(tmp_path / "in.jsonl")
    pipeline.prepare("gsm8k", source, tmp_path / "o.jsonl", Options(), said.append)
    assert said == ["1 rows read, 1 kept"]


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("gsm9k", {}, "KIND = 'gsm9k' is unknown; choose one of gsm8k, "),
        ("gsm8k", {"source": "none.jsonl"}, "IN = none.jsonl cannot be read: No such file"),
        ("gsm8k", {"out": "out.json"}, "OUT = out.json: expected a name that ends in .jsonl"),
        ("math", {}, "none of 1 rows can be used as math (1 no answer); give a dataset with the"),
        ("gsm8k", {"val": "1"}, "--val 1 leaves no training row of 1"),
        (
            "gsm8k",
            {"evaluation": "in.jsonl"},
            "(1 in an evaluation set); check the files of --decon",
        ),
        (
            "gsm8k",
            {"evaluation": "other.jsonl"},
            "other.jsonl, row 1: no problem in the columns a;",
        ),
    ],
)
def test_wrong_command_is_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    changes: dict[str, str],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}))
    if kind == "math":
        Path("in.jsonl").write_text(json.dumps({"question": "1+1?"}))
    Path("other.jsonl").write_text('{"a": 1}')
    arguments = ["prepare", kind, changes.get("source", "in.jsonl"), changes.get("out", "o.jsonl")]
    arguments += ["--val", changes["val"]] if "val" in changes else []
    arguments += ["--decontaminate", changes["evaluation"]] if "evaluation" in changes else []
    assert command_line.main(arguments) == 2
    errors = capsys.readouterr().err
    assert problem in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "other.jsonl"}


def test_command_prints_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    rows = [PUBLISHED["gsm8k"][0], {"question": "1+1?", "answer": "2"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command_line.main(["prepare", "gsm8k", str(source), str(tmp_path / "o.jsonl")]) == 0
    printed = capsys.readouterr().out
    for words in ("read", "kept", "dropped: no answer", "sha256", "o.report.json"):
        assert words in printed


def test_unknown_option_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ngram = 0"):
        pipeline.prepare("gsm8k", "in", Path("o.jsonl"), Options(ngram=0), print)
