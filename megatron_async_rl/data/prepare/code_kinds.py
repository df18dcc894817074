"""Rows of programming datasets: {prompt, tests, function} and metadata."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from megatron_async_rl.data.code_tests import read_tests
from megatron_async_rl.data.prepare.columns import Unusable, from_json, metadata, statement, text
from megatron_async_rl.errors import DataError

# problems with several right outputs, which a comparison with one of them would call wrong
_CHECKER = re.compile(
    r"\b(?:multiple|several|many|more than one)\b[^.\n]{0,100}\bany\b|"
    r"\b(?:print|output|return|find) any\b(?! (?:extra|other|additional))|"
    r"\bany (?:of (?:them|these)|(?:valid|correct|suitable|possible) (?:answer|solution|output))\b|"
    r"\b(?:print|output|return)\b[^.\n]{0,80}\bin any order\b|\bspecial judge\b",
    re.IGNORECASE,
)


def apps(row: dict[str, Any]) -> dict[str, Any]:
    """Converts APPS and TACO: `input_output` is JSON of {inputs, outputs, fn_name}."""
    prompt = statement(row, "question", "problem")
    cases = from_json(row.get("input_output") or {})
    if not isinstance(cases, dict):
        raise Unusable("no tests")
    function = cases.get("fn_name") or ""
    tests = pairs(cases.get("inputs"), cases.get("outputs"), function)
    columns = "difficulty source url time_limit memory_limit"
    return code_row(row, prompt, tests, function, columns)


def deepcoder(row: dict[str, Any]) -> dict[str, Any]:
    """Converts DeepCoder: `tests` is JSON, as in APPS or a list of {input, output}, maybe typed."""
    prompt = statement(row, "problem", "question")
    cases = from_json(row.get("tests") or [])
    if isinstance(cases, dict):
        function = cases.get("fn_name") or ""
        tests = pairs(cases.get("inputs"), cases.get("outputs"), function)
    else:
        function = _function_of(cases, row.get("metadata"))
        tests = listed(cases, function)
    return code_row(row, prompt, tests, function, "difficulty source")


def codecontests(row: dict[str, Any]) -> dict[str, Any]:
    """Converts CodeContests: three groups of tests, each as {input: [...], output: [...]}."""
    prompt = statement(row, "description")
    if text(row, "input_file") or text(row, "output_file"):
        raise Unusable("reads or writes a file")
    tests = []
    for name in ("public_tests", "private_tests", "generated_tests"):
        if group := row.get(name):
            tests += pairs(group.get("input"), group.get("output"))
    limit = row.get("time_limit")
    if isinstance(limit, dict):
        limit = float(limit.get("seconds") or 0) + float(limit.get("nanos") or 0) / 1e9
    extra = {"rating": row.get("cf_rating"), "time_limit_s": limit}
    return code_row(row, prompt, tests, "", "name difficulty cf_tags", **extra)


def codeforces(row: dict[str, Any]) -> dict[str, Any]:
    """Converts Codeforces (open-r1): the statement in parts, `official_tests` and `examples`."""
    prompt = statement(row, "description")
    if text(row, "generated_checker"):
        raise Unusable("needs a checker")
    if text(row, "interaction_format"):
        raise Unusable("interactive")
    if text(row, "input_mode") not in ("", "stdio"):
        raise Unusable("reads or writes a file")
    parts = [prompt]
    for title, name in (("Input", "input_format"), ("Output", "output_format"), ("Note", "note")):
        if part := text(row, name):
            parts.append(f"{title}\n\n{part}")
    examples = listed(from_json(row.get("examples") or []))
    parts += [f"Example\n\nInput:\n{e['input']}\nOutput:\n{e['output']}" for e in examples]
    tests = listed(from_json(row.get("official_tests") or [])) or examples
    columns = "title rating tags contest_id index"
    limit = row.get("time_limit")
    return code_row(row, "\n\n".join(parts), tests, "", columns, time_limit_s=limit)


def code_row(
    row: dict[str, Any],
    prompt: str,
    tests: list[dict[str, Any]],
    function: str = "",
    columns: str = "",
    **extra: Any,
) -> dict[str, Any]:
    """Returns our row: the prompt with the starter code, and the tests without duplicates.

    `columns`: of `row`, that are kept if they have a value, as `extra` ones are. Raises Unusable if
    reward.function = code could not use it.
    """
    if not tests:
        raise Unusable("no tests")
    if _CHECKER.search(prompt):
        raise Unusable("needs a checker")
    if starter_code := text(row, "starter_code"):
        prompt += f"\n\nComplete this code:\n\n```python\n{starter_code}\n```"
    elif function:
        prompt += f"\n\nWrite a Python function `{function}`."
    unique = {repr(test): test for test in tests}
    kept = metadata(row, *columns.split()) | {n: value for n, value in extra.items() if value}
    ours = {"prompt": prompt, "tests": list(unique.values()), **kept}
    if function:
        ours["function"] = function
    try:
        read_tests(ours)
        msgspec.msgpack.encode(ours)
    except DataError:
        raise Unusable("tests of another form") from None
    except OverflowError:  # which no message can carry
        raise Unusable("numbers of more than 64 bits") from None
    return ours


def pairs(inputs: Any, outputs: Any, function: str = "") -> list[dict[str, Any]]:
    """Returns the tests of two lists of the same length. Raises Unusable."""
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence):
        return []
    if len(inputs) != len(outputs):
        raise Unusable("inputs and outputs differ in number")
    return listed(
        [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)], function
    )


def listed(cases: Any, function: str = "") -> list[dict[str, Any]]:
    """Returns the tests of a list of {input, output}; other keys are left out. Raises Unusable."""
    if not isinstance(cases, list) or not all(isinstance(c, dict) for c in cases):
        raise Unusable("tests of another form")
    if not all({"input", "output"} <= c.keys() for c in cases):
        raise Unusable("tests of another form")
    if not function:
        return [{n: _as_text(case[n]) for n in ("input", "output")} for case in cases]
    if all(isinstance(case["input"], str) for case in cases):  # LiveCodeBench: all as JSON texts
        return [
            {"input": _lines(case["input"]), "output": from_json(case["output"])} for case in cases
        ]
    tests = [{"input": _arguments(c["input"]), "output": c["output"]} for c in cases]
    if all(isinstance(t["output"], list) and len(t["output"]) == 1 for t in tests):
        return [t | {"output": t["output"][0]} for t in tests]  # APPS: each in its own list
    return tests


def _as_text(value: Any) -> str:
    """Returns an input or output of a program: APPS has some as lists of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise Unusable("tests of another form")
    return value


def _lines(text: str) -> list[Any]:
    """Returns the arguments in a text with one JSON value per line."""
    return [from_json(line) for line in text.splitlines() if line.strip()]


def _arguments(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Unusable("tests of another form")
    if any(isinstance(a, dict) and a and all(k.lstrip("-").isdigit() for k in a) for a in value):
        raise Unusable("arguments with integer keys")  # which JSON turned into texts
    return value


def _function_of(cases: Any, details: Any) -> str:
    """Returns the name of the function that typed tests call, "" for programs. Raises Unusable."""
    first = cases[0] if isinstance(cases, list) and cases and isinstance(cases[0], dict) else {}
    kinds = {first.get("type"), first.get("testtype")}
    if kinds & {"stdin", "stdin_stdout"}:
        return ""
    names = [first.get("fn_name"), first.get("func_name")]
    for value in (first.get("metadata"), details):
        found = from_json(value) if isinstance(value, str) and value.startswith("{") else value
        names.append(found.get("func_name") if isinstance(found, dict) else None)
    name = next((name for name in names if name), "")
    if not name and kinds & {"functional", "function_call"}:
        raise Unusable("tests call a function without a name")
    return name
