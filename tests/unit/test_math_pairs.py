"""Pairs of a reference answer and an answer, in classes (tests/support/math_pairs.txt)."""

from __future__ import annotations

from pathlib import Path

import pytest
from math_tables import decision

PAIRS = Path(__file__).parents[1] / "support" / "math_pairs.txt"


def read_classes() -> dict[str, list[tuple[str, list[str], list[str]]]]:
    """Returns (reference answer, right answers, wrong answers) by class.

    A line is `gold || right ;; right || wrong ;; wrong`; a response without a box begins with `!`.
    """
    classes: dict[str, list[tuple[str, list[str], list[str]]]] = {}
    for line in PAIRS.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            rows = classes.setdefault(line[2:], [])
        else:
            gold, right, wrong = line.split(" || ")
            rows.append((gold, right.split(" ;; "), wrong.split(" ;; ")))
    return classes


CLASSES = read_classes()


@pytest.mark.parametrize("name", CLASSES)
def test_no_pair_of_a_class_is_decided_wrongly(name: str) -> None:
    """None, which leaves the decision to math-verify, is not wrong, but rare."""
    errors, decisions = [], []
    for gold, *groups in CLASSES[name]:
        for right, answers in zip((True, False), groups, strict=True):
            for answer in answers:
                response = answer[1:] if answer[0] == "!" else f"So \\boxed{{{answer}}}."
                decisions.append(decision(response, gold))
                if decisions[-1] is (not right):
                    errors.append((gold, answer, right))
    assert errors == []
    assert decisions.count(None) <= len(decisions) / 5
