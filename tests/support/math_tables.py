r"""Tables of answers for tests of the built-in `math` reward.

A line is `gold <- answer ;; answer`; \u00b6 is a line break, and lines that begin with # are
titles.
"""

from __future__ import annotations

from megatron_async_rl.reward import math_answer


def cases(table: str) -> list[tuple[str, str]]:
    """Returns (answer, gold) of each answer of a table."""
    rows = [line.split(" <- ", 1) for line in table.strip().splitlines() if line[0] != "#"]
    return [
        (answer.replace("\u00b6", "\n"), gold)
        for gold, answers in rows
        for answer in answers.split(" ;; ")
    ]


def decision(response: str, gold: str) -> bool | None:
    """Returns what is decided without math-verify, None where it has to decide."""
    return math_answer.compare_plain(*math_answer.read_answers(response, {"answer": gold}))
