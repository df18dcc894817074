"""The published formats that `prepare` knows, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_async_rl.data.prepare import code_kinds, livecodebench, math_kinds


@dataclass(frozen=True)
class Kind:
    columns: str  # that the published rows have, for the documentation and error messages
    reward: str  # reward.function of the rows made
    convert: Callable[[dict[str, Any]], dict[str, Any]]
    """Returns our row of a published row. Raises Unusable with the reason to leave it out."""


KINDS = {
    "gsm8k": Kind("question, answer (ends in #### 72)", "math", math_kinds.gsm8k),
    "math": Kind("problem, solution (with \\boxed) or answer", "math", math_kinds.problem),
    "aime": Kind("problem, answer", "math", math_kinds.problem),
    "amc": Kind("problem, answer", "math", math_kinds.problem),
    "deepscaler": Kind("problem, answer, solution", "math", math_kinds.problem),
    "deepcoder": Kind("problem, tests, starter_code", "code", code_kinds.deepcoder),
    "apps": Kind("question, input_output, starter_code", "code", code_kinds.apps),
    "taco": Kind("question, input_output, starter_code", "code", code_kinds.apps),
    "codecontests": Kind(
        "description, public_tests, private_tests, generated_tests",
        "code",
        code_kinds.codecontests,
    ),
    "livecodebench": Kind(
        "question_content, public_test_cases, private_test_cases, metadata",
        "code",
        livecodebench.convert,
    ),
    "codeforces": Kind("description, examples, official_tests", "code", code_kinds.codeforces),
}
