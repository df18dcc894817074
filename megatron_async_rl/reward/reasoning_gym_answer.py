"""`reward.function: reasoning_gym`: the task's own scorer, for rows of data.reader: reasoning_gym.

The answer is the text of the last <answer>...</answer>, as in reasoning-gym's system prompts.
Scores are from 0 to 1; many tasks give a fraction for an answer that is nearly right.
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from megatron_async_rl.data.reasoning_gym_rows import Task
from megatron_async_rl.errors import DataError


def score(prompt: str, response: str, row: dict[str, Any]) -> float:
    """Returns the score. Raises DataError if the task cannot be made again from the row."""
    from reasoning_gym.utils import extract_answer

    dataset, entry = _entry(msgspec.json.encode(row["task"]), row["index"])
    if (entry["question"], entry["answer"]) != (row["question"], row["answer"]):
        entry = row["entry"]  # the task of a generator that is not deterministic
    if entry is None:
        raise DataError(
            f"row {row['id']}: this installation of reasoning-gym makes another task of it",
            "install one version of reasoning-gym on all hosts",
        )
    return float(dataset.score_answer(extract_answer(response), entry))


@functools.lru_cache(maxsize=1024)
def _entry(task: bytes, index: int) -> tuple[Any, dict[str, Any]]:
    """Returns the dataset and the task; the responses of a group are scored one after another."""
    dataset = _dataset(task)
    return dataset, dataset[index]


@functools.lru_cache(maxsize=64)
def _dataset(task: bytes) -> Any:
    return msgspec.json.decode(task, type=Task).dataset()
