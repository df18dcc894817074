"""Reads single fields of a model folder's config.json; config_json.py interprets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_async_rl.errors import DataError
from megatron_async_rl.model import model_files

AUTHORS = "use the config.json of the model's authors"


class ConfigFields:
    """A folder's config.json. Raises DataError if it is missing or not a JSON object."""

    def __init__(self, model_path: str | Path) -> None:
        self.key = f"model.path = {model_path}"
        self.folder = Path(model_path)
        file = self.folder / "config.json"
        if not file.is_file():
            raise DataError(
                f"{self.key} has no config.json", "give the folder of a Hugging Face model"
            )
        self.raw: dict[str, Any] = model_files.read_json(file)

    def number(
        self, key: str, default: float | None = None, part: dict[str, Any] | None = None
    ) -> float:
        """Returns a number of the top level, or of `part` alone if given; null means default.

        Raises DataError if it is not a number, or missing without a default.
        """
        return float(self._value(key, default, part, (int, float), "a number"))

    def integer(
        self,
        key: str,
        least: int = 1,
        default: int | None = None,
        part: dict[str, Any] | None = None,
    ) -> int:
        """Returns an integer as `number` does a number. Raises DataError if it is below `least`."""
        expected = f"an integer of at least {least}"
        value = self._value(key, default, part, (int,), expected)
        if value < least:
            raise self.refused(f"{key} = {value!r}, expected {expected}")
        return value

    def refused(self, problem: str, remedy: str = AUTHORS) -> DataError:
        """Returns the error that config.json has `problem`."""
        return DataError(f"{self.key}: config.json has {problem}", remedy)

    def _value(
        self,
        key: str,
        default: float | None,
        part: dict[str, Any] | None,
        types: tuple[type, ...],
        expected: str,
    ) -> Any:
        value = (self.raw if part is None else part).get(key)
        if value is None:
            value = default
        if not isinstance(value, types) or isinstance(value, bool):
            where = "" if part is None else " in its rope_parameters or rope_scaling"
            raise self.refused(f"{key} = {value!r}{where}, expected {expected}")
        return value
