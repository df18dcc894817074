"""Rows of LiveCodeBench. Its private tests are base64 of zlib of a pickle of a JSON text.

Nothing is unpickled: `pickled_text` reads the few opcodes of which the pickle of one text consists
and refuses any other.
"""

from __future__ import annotations

import base64
import binascii
import pickletools
import zlib
from typing import Any

from megatron_async_rl.data.prepare.code_kinds import code_row, listed
from megatron_async_rl.data.prepare.columns import (
    Unusable,
    from_json,
    statement,
)

MAX_TEST_BYTES = 1 << 29  # of one problem, decompressed
_TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
_NO_EFFECT = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """Converts a row; with `metadata.func_name` its tests call a method of Solution."""
    prompt = statement(row, "question_content")
    details = from_json(row.get("metadata") or {})
    function = (details.get("func_name") if isinstance(details, dict) else "") or ""
    tests = listed(from_json(row.get("public_test_cases") or []), function)
    tests += listed(_private_tests(row.get("private_test_cases") or []), function)
    columns = "question_title platform contest_date contest_id difficulty"
    return code_row(row, prompt, tests, function, columns)


def _private_tests(value: Any) -> Any:
    if not isinstance(value, str) or value.lstrip().startswith("["):
        return from_json(value)
    try:
        packed = base64.b64decode(value, validate=True)
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(packed, MAX_TEST_BYTES)
    except (binascii.Error, ValueError, zlib.error):
        raise Unusable("private tests are damaged") from None
    if not unpacker.eof:
        raise Unusable("private tests are damaged or larger than 512 MiB")
    return from_json(pickled_text(data))


def pickled_text(data: bytes) -> str:
    """Returns the text of which `data` is a pickle. Raises Unusable for any other content."""
    found: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _TEXTS:
                found.append(str(argument))
            elif opcode.name not in _NO_EFFECT:
                raise Unusable("private tests are a pickle of something else than a text")
    except (ValueError, IndexError, OverflowError):
        raise Unusable("private tests are damaged") from None
    if len(found) != 1:
        raise Unusable("private tests are a pickle of something else than a text")
    return found[0]
