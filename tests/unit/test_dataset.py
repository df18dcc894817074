"""Reading and checking a dataset, and resuming its order at any position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import make_model

from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.data.dataset import PromptStream, read_prompts
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
    return read_prompts(str(path), "data.train", settings, Tokenizer(settings.model.path))


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


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{not json", "row 2: not JSON"),
        ({"answer": "1"}, "row 2: no `prompt`"),
        ({"prompt": "1+2="}, "row 2: no `answer`"),
        ({"prompt": "1+2=", "answer": ""}, "row 2: no `answer`"),
        (
            {"prompt": "12345678901", "answer": "1"},
            "row 2: the prompt has 11 tokens, must be 1 to 10",
        ),
        ({"prompt": "", "answer": "1"}, "row 2: no `prompt`"),
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
    first, again = PromptStream(prompts, seed=5), PromptStream(prompts, seed=5)
    order = [first.next().prompt_id for _ in range(60)]
    assert order == [again.next().prompt_id for _ in range(60)]
    assert all(
        sorted(order[k : k + 20]) == sorted(p.prompt_id for p in prompts) for k in (0, 20, 40)
    )
    assert order[:20] != order[20:40]


@pytest.mark.parametrize("position", [0, 7, 20, 33])
def test_stream_started_at_a_position_continues_the_order(position: int) -> None:
    prompts = [Prompt(str(n), None, {}) for n in range(20)]  # type: ignore[arg-type]
    whole = PromptStream(prompts, seed=5)
    order = [whole.next().prompt_id for _ in range(50)]
    resumed = PromptStream(prompts, seed=5, start=position)
    assert [resumed.next().prompt_id for _ in range(50 - position)] == order[position:]
