"""Reading and checking a dataset, and resuming its order at any position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_model import make_model

from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.datasets import EvaluationConfig, EvaluationSet, SourceConfig
from megatron_async_rl.data import math_rows
from megatron_async_rl.data.dataset import check_source, read_source
from megatron_async_rl.data.digests import changed_data, record_data
from megatron_async_rl.data.order import PromptStream, SourcePrompts
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import Prompt


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    model = make_model(tmp_path_factory.mktemp("model"))
    return load.from_tree(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": str(model), "context_tokens": 40},
            "data": {"train": "unused"},
            "rollout": {"max_new_tokens": 30},
            "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
        }
    )


def read(settings: Config, path: Path, *rows: Any) -> list[Prompt]:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return read_source(
        SourceConfig(path=str(path)), "data.train", settings, Tokenizer(settings.model.path)
    )


def test_rows_become_prompts_with_ids_and_fields(settings: Config, tmp_path: Path) -> None:
    prompts = read(
        settings,
        tmp_path / "d.jsonl",
        {"prompt": "1+2=", "answer": 3, "id": "x"},
        {"prompt": "2=", "answer": "2"},
    )
    assert [prompt.prompt_id for prompt in prompts] == ["x", "2"]
    assert Tokenizer(settings.model.path).decode(prompts[0].ids) == "1+2="
    assert prompts[0].row["answer"] == 3


def test_prompt_that_opens_thinking_names_its_tag(settings: Config, tmp_path: Path) -> None:
    reward = msgspec.structs.replace(settings.reward, thinking_tags=("<a>", "</a>"))
    rows = [{"prompt": prompt, "answer": "1"} for prompt in ("1+2=<a>", "1<a></a>", "1<a>2")]
    prompts = read(msgspec.structs.replace(settings, reward=reward), tmp_path / "d.jsonl", *rows)
    assert [prompt.opening_tag for prompt in prompts] == ["<a>", "", ""]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{not json", "row 2: not JSON"),
        ({"answer": "1"}, "row 2: no `prompt`; the columns are: answer"),
        ({"prompt": "1+2="}, "row 2: no `answer`"),
        ({"prompt": "1+2=", "answer": ""}, "row 2: no `answer`"),
        (
            {"prompt": "12345678901", "answer": "1"},
            "row 2: the prompt has 11 tokens, must be 1 to 10",
        ),
        ({"prompt": "", "answer": "1"}, "row 2: `prompt` is ''"),
        ({"prompt": "1", "answer": "1", "id": "first"}, "row 2: duplicate id 'first'"),
    ],
)
def test_bad_row_error_names_file_and_row(
    settings: Config, tmp_path: Path, row: Any, complaint: str
) -> None:
    with pytest.raises(DataError, match=r"data.train = .*d\.jsonl") as error:
        read(settings, tmp_path / "d.jsonl", {"prompt": "1", "answer": "1", "id": "first"}, row)
    assert complaint in str(error.value)


def test_unicode_line_separator_does_not_end_a_row(settings: Config, tmp_path: Path) -> None:
    assert len(read(settings, tmp_path / "d.jsonl", '{"prompt": "1", "answer": "a\u2028b"}')) == 1


def test_order_depends_on_seed_and_epoch() -> None:
    prompts = [Prompt(str(n), None, {}) for n in range(20)]  # type: ignore[arg-type]
    first, again = (
        PromptStream([SourcePrompts(prompts)], seed=5),
        PromptStream([SourcePrompts(prompts)], seed=5),
    )
    order = [first.next().prompt_id for _ in range(60)]
    assert order == [again.next().prompt_id for _ in range(60)]
    assert all(
        sorted(order[k : k + 20]) == sorted(p.prompt_id for p in prompts) for k in (0, 20, 40)
    )
    assert order[:20] != order[20:40]


def make_prompts(name: str, count: int) -> list[Prompt]:
    return [Prompt(f"{name}{n}", None, {}) for n in range(count)]  # type: ignore[arg-type]


def test_order_of_one_source_is_that_of_earlier_versions() -> None:
    """The journals of existing runs replay with this order."""
    stream = PromptStream([SourcePrompts(make_prompts("", 5))], seed=5)
    order = [int(stream.next().prompt_id) for _ in range(15)]
    assert order == [4, 3, 1, 2, 0, 2, 0, 4, 3, 1, 0, 3, 4, 1, 2]


WEIGHTED = [
    SourcePrompts(make_prompts("a", 7), 5.0),
    SourcePrompts(make_prompts("b", 8), 2.5),
    SourcePrompts(make_prompts("c", 9), 0.3),
]


def test_sources_get_their_shares_at_every_position() -> None:
    stream = PromptStream(WEIGHTED, seed=1)
    counts = dict.fromkeys("abc", 0)
    for position in range(1, 2000):
        counts[stream.next().prompt_id[0]] += 1
        for source, name in zip(WEIGHTED, "abc", strict=True):
            share = position * source.weight / 7.8
            assert share - 2 < counts[name] < share + 1


def test_each_source_has_its_own_epochs() -> None:
    stream = PromptStream(WEIGHTED, seed=1)
    order = [stream.next().prompt_id for _ in range(400)]
    for source in WEIGHTED:
        own = [prompt for prompt in order if prompt[0] == source.prompts[0].prompt_id[0]]
        size = len(source.prompts)
        epochs = [own[k : k + size] for k in range(0, len(own) - size, size)]
        assert all(sorted(epoch) == sorted(p.prompt_id for p in source.prompts) for epoch in epochs)
    assert len({tuple(order[k : k + 7]) for k in range(0, 40, 7)}) > 1


def test_order_of_several_sources_depends_on_the_seed() -> None:
    first, again, other = (PromptStream(WEIGHTED, seed) for seed in (1, 1, 2))
    order = [first.next().prompt_id for _ in range(400)]
    assert order == [again.next().prompt_id for _ in range(400)]
    assert order != [other.next().prompt_id for _ in range(400)]


@pytest.mark.parametrize(
    ("answer", "text"),
    [(7, "7"), (-3, "-3"), (2.5, "2.5"), (1e21, "1000000000000000000000"), ("x", "x")],
)
def test_number_as_answer_is_taken_as_text(answer: Any, text: str) -> None:
    assert math_rows.read_answer({"answer": answer}) == text


@pytest.mark.parametrize(
    "answer", [["2"], {"value": 2}, True, False, [], {}, None, "", "  ", "$$", "\\boxed{ }"]
)
def test_answer_of_another_type_is_refused_with_file_and_row(
    settings: Config, tmp_path: Path, answer: Any
) -> None:
    good = {"prompt": "1", "answer": "1"}
    with pytest.raises(DataError, match=r"data\.train = .*d\.jsonl, row 2: .*`answer`"):
        read(settings, tmp_path / "d.jsonl", good, {"prompt": "1", "answer": answer})


def test_byte_order_mark_is_skipped(settings: Config, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "1", "answer": "1"}\r\n\r\n{"prompt": "2", "answer": "2"}'
    )
    assert check_source(SourceConfig(path=str(path)), "data.train", settings) == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"prompt": "1", "answer": "caf\u00e9"}'.encode("latin-1"), "row 1: not UTF-8"),
        ('{"prompt": "1", "answer": "1"}'.encode("utf-16"), "row 1: not UTF-8 but UTF-16"),
        (b'{"prompt": "1", "answer": ' + b"[" * 5000, "row 1: nested too deeply"),
    ],
)
def test_unreadable_bytes_are_one_line_with_the_row(
    settings: Config, tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        check_source(SourceConfig(path=str(path)), "data.train", settings)


def test_number_that_no_message_can_carry_is_refused(settings: Config, tmp_path: Path) -> None:
    row = {"prompt": "1", "answer": "1", "extra": [2**64]}
    with pytest.raises(
        DataError, match=r"row 1: no message can carry it: .*; write such values as"
    ):
        read(settings, tmp_path / "d.jsonl", row)
    assert read(settings, tmp_path / "d.jsonl", row | {"extra": [2**64 - 1, -(2**63)]})


def test_null_id_is_no_id(settings: Config, tmp_path: Path) -> None:
    row = {"prompt": "1", "answer": "1", "id": None}
    prompts = read(settings, tmp_path / "d.jsonl", row, row)
    assert [prompt.prompt_id for prompt in prompts] == ["1", "2"]


@pytest.mark.parametrize("change", ["a row more", "a row less", "another answer", "eval"])
def test_changed_data_is_found_at_the_next_start(
    settings: Config, tmp_path: Path, change: str
) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    rows = ['{"prompt": "1", "answer": "1"}\n', '{"prompt": "2", "answer": "2"}\n']
    for path in (train, held_out):
        path.write_text("".join(rows))
    data = msgspec.structs.replace(settings.data, train=str(train))
    evaluation = EvaluationConfig(sets={"held_out": EvaluationSet(path=str(held_out))})
    config = msgspec.structs.replace(settings, data=data, evaluation=evaluation)
    assert changed_data(tmp_path, config) == ""  # a run that has recorded none
    record_data(tmp_path, config)
    assert changed_data(tmp_path, config) == ""
    changed = {"a row more": [*rows, rows[0]], "a row less": rows[:1]}.get(change, [rows[0]] * 2)
    path = held_out if change == "eval" else train
    path.write_text("".join(changed))
    setting = "evaluation.sets.held_out.path" if change == "eval" else "data.train"
    found = changed_data(tmp_path, config)
    assert found.startswith(f"{setting} = {path} has other content") and "--from-scratch" in found


def test_overlong_prompt_is_refused_with_its_row_before_the_start(
    settings: Config, tmp_path: Path
) -> None:
    rows = [{"prompt": "1" * length, "answer": "1"} for length in (10, 11)]
    problem = r"row 2: the prompt has 11 tokens, must be 1 to 10 .*data\.overlong=drop"
    with pytest.raises(DataError, match=problem):
        read(settings, tmp_path / "d.jsonl", *rows)
    with pytest.raises(DataError, match=problem):
        check_source(SourceConfig(path=str(tmp_path / "d.jsonl")), "data.train", settings)


def test_overlong_prompts_are_dropped_and_counted(settings: Config, tmp_path: Path) -> None:
    data = msgspec.structs.replace(settings.data, overlong="drop")
    config, path = msgspec.structs.replace(settings, data=data), tmp_path / "d.jsonl"
    lengths, reports = (11, 10, 300, 1), list[str]()
    path.write_text("".join(f'{{"prompt": "{"1" * n}", "answer": "1"}}\n' for n in lengths))
    tokenizer = Tokenizer(settings.model.path)
    prompts = read_source(
        SourceConfig(path=str(path)), "data.train", config, tokenizer, reports.append
    )
    assert [len(prompt.ids) for prompt in prompts] == [10, 1]
    assert check_source(SourceConfig(path=str(path)), "data.train", config, reports.append) == 4
    [report, checked] = reports
    assert checked == report
    assert report.startswith(f"2 of 4 prompts of data.train = {path} have more than 10 tokens")
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    none_is_left = r"1 of 1 prompts .*data\.overlong = drop\): none is left"
    with pytest.raises(DataError, match=none_is_left):
        read_source(SourceConfig(path=str(path)), "data.train", config, tokenizer, reports.append)
    with pytest.raises(DataError, match=none_is_left):
        check_source(SourceConfig(path=str(path)), "data.train", config)
