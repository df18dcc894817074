"""Reads the small files of a model folder. A damaged one is a DataError that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_async_rl.errors import DataError

REMEDY = "download the model again"


def read_text(path: Path) -> str:
    """Returns the text of a file. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}", REMEDY) from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8", REMEDY) from None


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file, {} if there is no such file. Raises DataError."""
    if not path.exists():
        return {}
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is not JSON: {e}", REMEDY) from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object", REMEDY)
    return found
