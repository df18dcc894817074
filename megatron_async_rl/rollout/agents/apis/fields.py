"""Reads a JSON request and its fields; a wrong one is an error that names it."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from megatron_async_rl.rollout.agents.apis.request import RequestError

Kind = TypeVar("Kind")


def read_json(text: str | bytes) -> Any:
    """Raises ValueError unless the text is JSON in Unicode, RecursionError for one too deep."""
    text = text if isinstance(text, str) else text.decode()
    value = json.loads(text)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
    return value


class Fields:
    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body

    def objects(self, name: str, required: bool = False) -> list[dict[str, Any]]:
        value = self._body.get(name)
        if value is None and not required:
            return []
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise RequestError(400, f"{name} must be a list of objects")
        if required and not value:
            raise RequestError(400, f"{name} is empty")
        return value

    def object(self, name: str) -> dict[str, Any]:
        return _of_type(dict, name, self._body.get(name), "an object")

    def json_object(self, name: str) -> dict[str, Any]:
        """Returns an object, or one that is written as a JSON text."""
        value = self._body.get(name) or {}
        if isinstance(value, str):
            try:
                value = read_json(value)
            except ValueError:
                raise RequestError(400, f"{name} is not JSON in Unicode") from None
        return _of_type(dict, name, value, "a JSON object")

    def text(self, name: str) -> str:
        return _of_type(str, name, self._body.get(name), "a string")

    def texts(self, name: str) -> tuple[str, ...]:
        """Returns one text or a list of them as a tuple."""
        value = self._body.get(name) or []
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            raise RequestError(400, f"{name} must be a string or a list of strings")
        if len(values) > 16:
            raise RequestError(400, f"{name} has {len(values)} entries, at most 16 are allowed")
        return tuple(values)

    def integer(self, name: str, default: int | None = None) -> int | None:
        value = self._body.get(name)
        return default if value is None else _of_type(int, name, value, "an integer")

    def count(self, name: str) -> int:
        """Returns 1 if the field is missing."""
        value = self.integer(name)
        return 1 if value is None else value

    def boolean(self, name: str) -> bool:
        return _of_type(bool, name, self._body.get(name) or False, "true or false")


def _of_type(kind: type[Kind], name: str, value: Any, wanted: str) -> Kind:
    if type(value) is not kind:  # a bool is no int
        raise RequestError(400, f"{name} must be {wanted}")
    return value
