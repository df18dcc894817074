"""Tasks of reasoning-gym as rows, and their scorers as reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from config_builders import config_tree

from megatron_async_rl import hooks
from megatron_async_rl.config import load
from megatron_async_rl.config.datasets import SourceConfig
from megatron_async_rl.data.sources import Row, read_rows
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol import messages

pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
SUMS = (
    "- name: basic_arithmetic\n  size: 3\n  seed: 1\n"
    "  config: {max_terms: 2, operators: [+], allow_parentheses: false}\n"
)
SETTINGS = {"data.reader": "reasoning_gym", "reward.function": "reasoning_gym"}


def rows(path: Path, text: str) -> list[Row]:
    file = path / "tasks.yml"
    file.write_text(text)
    config = load.from_tree(config_tree(**SETTINGS))
    return list(read_rows(SourceConfig(path=str(file)), "data.train", config))


def score(response: str, row: dict[str, Any]) -> float:
    return hooks.load("reward.function", "reasoning_gym")(row["prompt"], response, row)


def test_rows_are_tasks_and_the_scorer_knows_them(tmp_path: Path) -> None:
    found = rows(tmp_path, SUMS + "- {name: knights_knaves, size: 2, seed: 7}\n")
    assert [row.prompt_id for row in found] == [
        *(f"basic_arithmetic-1-{n}" for n in range(3)),
        *(f"knights_knaves-7-{n}" for n in range(2)),
    ]
    for row in found:
        sent = msgspec.json.decode(msgspec.json.encode(row.fields))  # as in a ScoreRequest
        answer = sent["answer"]
        assert score(f"so <answer>1</answer> no, <answer> {answer} </answer>", sent) == 1.0
        assert score(answer, sent) < 0.1  # outside of the tags
    a, b = (int(n) for n in found[0].fields["prompt"][:-1].split()[1::2])
    assert found[0].fields["answer"] == str(a + b)


def test_same_file_gives_the_same_rows(tmp_path: Path) -> None:
    assert rows(tmp_path, SUMS) == rows(tmp_path, SUMS)
    assert rows(tmp_path, SUMS) != rows(tmp_path, SUMS.replace("seed: 1", "seed: 2"))


def test_task_that_is_made_differently_is_scored_as_the_row_has_it(tmp_path: Path) -> None:
    row = rows(tmp_path, SUMS)[0].fields
    entry = row["entry"] | {"question": "another", "answer": "-5"}
    changed = row | {"question": "another", "answer": "-5", "entry": entry}
    assert score("<answer>-5</answer>", changed) == 1.0
    assert score(f"<answer>{row['answer']}</answer>", changed) < 0.1
    with pytest.raises(DataError, match="install one version of reasoning-gym"):
        score("<answer>-5</answer>", changed | {"entry": None})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- {name: no_such_task, size: 1, seed: 1}", "task no_such_task: "),
        ("- {name: basic_arithmetic, size: 1, seed: 1, config: {terms: 2}}", "'terms'"),
        ("- {name: basic_arithmetic, size: 1, seed: 1, config: {max_terms: 0}}", "max_terms"),
        ("- {name: basic_arithmetic, size: 1}", "missing required field `seed`"),
        ("- {name: basic_arithmetic, size: 1, seed: 1, terms: 2}", "unknown field `terms`"),
        ("name: [", "it is not a list of tasks"),
    ],
)
def test_wrong_task_is_named(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        rows(tmp_path, text)
    message = str(refused.value)
    assert problem in message and "tasks.yml" in message and "\n" not in message


def test_row_travels_in_a_score_request(tmp_path: Path) -> None:
    row = rows(tmp_path, SUMS)[1].fields
    request = messages.ScoreRequest(messages.SampleKey(1, 2, 3, 0), "1", row)
    decoded = msgspec.json.decode(msgspec.json.encode(request), type=messages.ScoreRequest)
    assert decoded.row == row
