"""The unit tests in a dataset row, for reward.function = code.

A program reads stdin and writes stdout; a function is called with arguments:

    {"prompt": ..., "tests": [{"input": "3 4\\n", "output": "7\\n"}, ...]}
    {"prompt": ..., "function": "add", "tests": [{"input": [3, 4], "output": 7}, ...]}

The dataset reader checks every row; a reward worker reads the tests again for each scoring.
"""

from __future__ import annotations

from typing import Any

import msgspec

from megatron_async_rl.errors import DataError


class CodeTests(msgspec.Struct, frozen=True):
    """`inputs[i]` must give `outputs[i]`: texts, or with `function` argument lists and results."""

    function: str  # empty: a program
    inputs: list[Any]
    outputs: list[Any]


def read_tests(row: dict[str, Any]) -> CodeTests:
    """Returns a row's tests. Raises DataError with the problem of the row."""
    tests, function = row.get("tests"), row.get("function", "")
    if not isinstance(tests, list) or not tests:
        raise DataError("no `tests`, which reward.function = code needs: a list of {input, output}")
    if not isinstance(function, str) or (function and not function.isidentifier()):
        raise DataError(f"`function` is {function!r}, must be the name of a function")
    input_type: type = list if function else str
    for number, test in enumerate(tests, 1):
        if not isinstance(test, dict) or not {"input", "output"} <= test.keys():
            raise DataError(f"test {number} is not an object with `input` and `output`")
        if isinstance(test["input"], input_type) and (function or isinstance(test["output"], str)):
            continue
        if function:
            raise DataError(f"test {number}: `input` must be the list of arguments of `function`")
        raise DataError(
            f"test {number}: `input` and `output` must be texts, since the row has no `function`"
        )
    return CodeTests(
        function, [test["input"] for test in tests], [test["output"] for test in tests]
    )
