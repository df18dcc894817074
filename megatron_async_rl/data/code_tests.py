"""The unit tests in a dataset row, for reward.function = code. Read by the controller at the start, by the judge each time.

{"prompt": ..., "tests": [{"input": "3 4\\n", "output": "7\\n"}, ...]}                      a program: stdin and stdout
{"prompt": ..., "function": "add", "tests": [{"input": [3, 4], "output": 7}, ...]}     a function: arguments and result
"""

from __future__ import annotations

from typing import Any

import msgspec

from megatron_async_rl.errors import DataError


class CodeTests(msgspec.Struct, frozen=True):
    """`inputs[i]` must give `outputs[i]`: texts, or with a `function` lists of arguments and their results."""

    function: str  # empty: a program
    inputs: list[Any]
    outputs: list[Any]


def read_tests(row: dict[str, Any]) -> CodeTests:
    """Raises DataError saying what the row lacks."""
    tests, function = row.get("tests"), row.get("function", "")
    if not isinstance(tests, list) or not tests:
        raise DataError(
            "no `tests`; reward.function = code needs a list of {input, output}, one or more"
        )
    if not isinstance(function, str) or (function and not function.isidentifier()):
        raise DataError(f"`function` is {function!r}, must be the name of a function")
    kind: type = list if function else str
    inputs, outputs = [], []
    for number, test in enumerate(tests, 1):
        if not isinstance(test, dict) or not {"input", "output"} <= test.keys():
            raise DataError(f"test {number} is no object with `input` and `output`")
        if not isinstance(test["input"], kind) or not (function or isinstance(test["output"], str)):
            must = (
                "`input` must be the list of arguments"
                if function
                else "`input` and `output` must be texts"
            )
            raise DataError(
                f"test {number}: {must} (a row with `function` calls it, one without runs a program)"
            )
        inputs.append(test["input"])
        outputs.append(test["output"])
    return CodeTests(function, inputs, outputs)
