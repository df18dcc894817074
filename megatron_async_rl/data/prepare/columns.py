"""Shared by the converters of all kinds: columns of a published row, and reasons to drop it."""

from __future__ import annotations

import re
from typing import Any

from megatron_async_rl.data.readers import decode_json
from megatron_async_rl.errors import DataError

_IMAGE = re.compile(
    r"<im(?:age|g)\b|!\[[^\]]*\]\(|\[im(?:age|g)\]|\\includegraphics|"
    r"https?://\S+\.(?:png|jpe?g|gif|svg)\b",
    re.IGNORECASE,
)


class Unusable(Exception):
    """A row that `prepare` leaves out; its text is the reason, under which rows are counted."""


def text(row: dict[str, Any], *names: str) -> str:
    """Returns the first of the columns that has a text, stripped; "" if none has."""
    for name in names:
        if isinstance(value := row.get(name), str) and value.strip():
            return value.strip()
    return ""


def statement(row: dict[str, Any], *names: str) -> str:
    """Returns the problem's text. Raises Unusable without one, and if it needs an image."""
    found = text(row, *names)
    if not found:
        raise Unusable("no problem")
    images = [row.get(name) for name in ("image", "images", "picture_num")]
    if _IMAGE.search(found) or any(str(value or "0") not in ("0", "[]", "{}") for value in images):
        raise Unusable("needs an image")
    return found


def metadata(row: dict[str, Any], *names: str) -> dict[str, Any]:
    """Returns those of the columns that have a value."""
    return {name: row[name] for name in names if row.get(name) not in (None, "", [], {})}


def from_json(value: Any) -> Any:
    """Returns the value of a column that may be a JSON text. Raises Unusable if it is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return decode_json(value.encode())
    except (DataError, UnicodeEncodeError):
        raise Unusable("tests are not JSON") from None
