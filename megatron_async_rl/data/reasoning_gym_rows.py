"""`data.reader: reasoning_gym`: tasks of the package reasoning-gym as rows.

The source's path is a YAML file with a list of tasks, in reasoning-gym's own names:

    - {name: basic_arithmetic, size: 2000, seed: 1, config: {max_terms: 2}}

`reward.function: reasoning_gym` generates the same task from the row and calls its scorer. Six of
the 105 generators of reasoning-gym 0.1.25 depend on Python's hash seed, so a row also has the task
itself, as plain data.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from megatron_async_rl.config.datasets import SourceConfig
from megatron_async_rl.errors import ConfigError, DataError


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tasks of one generator of reasoning-gym; number i depends on all fields but `size`."""

    name: str
    size: int
    seed: int
    config: dict[str, Any] = {}

    def dataset(self) -> Any:
        """Returns reasoning-gym's dataset. Raises ConfigError without the package, DataError."""
        try:
            import reasoning_gym
        except ImportError as e:
            raise ConfigError(
                f"reasoning-gym cannot be imported: {e}",
                "pip install 'megatron_async_rl[reasoning_gym]'",
            ) from None
        try:
            return reasoning_gym.create_dataset(
                self.name, size=self.size, seed=self.seed, **self.config
            )
        except (ValueError, TypeError, AssertionError) as e:
            raise DataError(f"task {self.name}: {e}", "correct its config") from None


def read(path: str, source: SourceConfig) -> Iterator[dict[str, Any]]:
    """Yields a row per task: prompt, answer, the task, and the fields that reproduce it."""
    for task in _read_tasks(Path(path)):
        dataset = task.dataset()
        for index in range(task.size):
            entry = dataset[index]
            yield {
                "id": f"{task.name}-{task.seed}-{index}",
                "prompt": entry["question"],  # may become a chat
                "question": entry["question"],
                "answer": entry["answer"],
                "task": msgspec.to_builtins(task),
                "index": index,
                "entry": _plain(entry),
            }


def _plain(entry: dict[str, Any]) -> dict[str, Any] | None:
    """Returns reasoning-gym's entry as it is after a message, None if it has other objects."""
    try:
        return msgspec.json.decode(msgspec.json.encode(entry))
    except TypeError:
        return None


def _read_tasks(path: Path) -> list[Task]:
    try:
        return msgspec.convert(yaml.safe_load(path.read_text()), list[Task])
    except OSError as e:
        raise DataError(f"it cannot be read: {e.strerror}", "give a file of tasks") from None
    except (yaml.YAMLError, UnicodeDecodeError, msgspec.ValidationError) as e:
        problem = " ".join(str(e).split())
        raise DataError(
            f"it is not a list of tasks with name, size, seed and config: {problem}",
            "correct the file",
        ) from None
