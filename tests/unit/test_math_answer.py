"""The built-in `math` reward: which answer of a response is compared, and which is correct."""

from __future__ import annotations

import time
from typing import Any

import pytest

from megatron_async_rl.errors import DataError
from megatron_async_rl.reward import math_answer


def reward(response: str, answer: Any) -> float:
    answers = math_answer.read_answers(response, {"id": "row-1", "answer": answer})
    is_equal = math_answer.compare_plain(*answers)
    return float(math_answer.compare_latex(*answers) if is_equal is None else is_equal)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{42}", "42"),
        (r"\boxed{42}", 42),
        (r"First \boxed{41}, no: \boxed{42}", "42"),
        (r"\boxed{42} is what I found in 3 steps.", "42"),
        (r"\boxed{\boxed{42}}", "42"),
        (r"\boxed{42} and \boxed{7", "42"),  # truncated within a second box
        (r"\boxed {42}", "42"),
        ("so 6 * 7 = 42", "42"),
        ("some work\n#### 42", "42"),
        ("some work\n#### 42\n", "6 * 7 = 42\n#### 42"),
        (r"\boxed{42}", r"the sum is $\boxed{42}$."),
        (r"\boxed{-7}", "-7"),
        ("it is -7.", "-7"),
        ("it is \u22127.", "-7"),
        ("10 - 3 = 7", "7"),
        ("10-3=7", "7"),
        (r"\boxed{85.0}", "85"),
        (r"\boxed{85}", 85.0),
        (r"\boxed{1e2}", r"1e2"),
        ("$1,234,567.50", "1234567.5"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{1\,234}", "1234"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{18.}", "18"),
        (r"\boxed{007}", "7"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{\dfrac{2}{4}}", r"\frac{1}{2}"),
        (r"\boxed{-\frac{1}{2}}", "-1/2"),
        ("it is 1/2.", "0.5"),
        (r"so it is \frac{1}{2}", "1/2"),
        (r"\boxed{\text{Evelyn}}", "Evelyn"),
        (r"\boxed{ yes }", r"\text{Yes}"),
    ],
)
def test_correct_answer_is_recognized_without_a_deadline(response: str, answer: Any) -> None:
    gold, answered = math_answer.read_answers(response, {"answer": answer})
    assert math_answer.compare_plain(gold, answered) is True


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "42"),
        ("I do not know.", "42"),
        (r"\boxed{}", "42"),
        (r"\boxed{ }", "42"),
        (r"\boxed{42} no, \boxed{41}", "42"),
        (r"\boxed{41} although 42", "42"),
        (r"\boxed{42 or \boxed{41}}", "42"),
        (r"\boxed{42", "421"),
        ("#### 42 or rather 41", "42"),
        ("42, no: 41", "42"),
        (r"\boxed{7}", "-7"),
        (r"\boxed{-7}", "7"),
        (r"\boxed{85.5}", "85"),
        (r"\boxed{100000001}", "100000000"),
        (r"\boxed{2}", r"\frac{1}{2}"),
        (r"the answer is \frac{1}{2}", "2"),
        (r"\boxed{1/3}", "0.25"),
        (r"\boxed{net}", "ten"),
        (r"\boxed{no}", r"\text{no one}"),
    ],
)
def test_wrong_answer_is_recognized_without_a_deadline(response: str, answer: Any) -> None:
    gold, answered = math_answer.read_answers(response, {"answer": answer})
    assert math_answer.compare_plain(gold, answered) is False


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{11\text{ cm}}", "11"),
        (r"\boxed{42 apples}", "42"),
        (r"\boxed{9}", "9 apples"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        (r"\boxed{\{3,2,1\}}", r"\{1,2,3\}"),
        (r"\boxed{12\%}", "0.12"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{0.333333333}", "1/3"),
    ],
)
def test_equivalent_answer_is_correct(response: str, answer: str) -> None:
    assert reward(response, answer) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{41, 42}", "42"),
        (r"\boxed{42 \text{ or } 41}", "42"),
        (r"\boxed{\{41, 42\}}", "42"),
        (r"\boxed{42 \ne 41}", "42"),
        (r"\boxed{42 = 41}", "42"),
        (r"\boxed{40, 41, 42, 43}", "42"),
        (r"\boxed{$41$ and $42$}", "42"),
        (r"\boxed{0.3333}", "1/3"),
        (r"\boxed{x}", "42"),
        (r"\boxed{\frac{0}{0}}", "42"),
        (r"\boxed{\infty}", "42"),
        (r"\boxed{" + "(" * 50 + "42}", "421"),
        (r"\boxed{(5,\infty)}", "(5,6)"),
    ],
)
def test_several_guesses_are_wrong(response: str, answer: str) -> None:
    assert reward(response, answer) == 0.0


@pytest.mark.parametrize(
    "row",
    [{}, {"answer": None}, {"answer": ""}, {"answer": " $ "}, {"answer": ["4"]}, {"answer": True}],
)
def test_row_without_answer_error_names_the_row(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"row 'row-1' .*`answer`"):
        math_answer.read_answers(r"\boxed{42}", {"id": "row-1", **row})


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 200_000,
        r"\boxed" + " " * 1_000_000,
        "{" * 500_000 + "}" * 500_000,
        "1,234," * 200_000,
        "9" * 1_000_000,
        "1/" * 500_000,
        r"\frac{1}" + " " * 1_000_000,
        r"\frac{" * 100_000,
        r"\boxed{" + r"\text{" * 10_000 + "}" * 10_001,
        r"\boxed{" + "a b " * 15_000 + "}",
        "</answer>" + "<answer>" * 100_000,
        r"\boxed{" + r"\text{a{}" * 10_000 + "}" * 10_000 + "}",
        r"\boxed{" + r"{a\over " * 200 + "}" * 200 + "}",
        " " * 64_000 + "x>",
        "<answer>" + r"\(" * 30_000 + "</answer>",
        "```python\n" + "\n" * 60_000,
        r"\boxed{" + r"\vec{j}\ne a, " * 3_000 + "}",
        "1 = a" + ", (" * 20_000 + "1",
    ],
    ids=range(18),
)
def test_no_text_delays_the_check_without_deadline(text: str) -> None:
    started = time.process_time()
    for gold in ("42", r"\text{a b}"):
        math_answer.compare_plain(*math_answer.read_answers(text, {"answer": gold}))
    assert time.process_time() - started < 1.0


def test_spaces_after_many_corrections_take_no_time() -> None:
    text = "Answer: 5. " + "no it's 6 " * 66 + " " * 1_300 + "?x"
    started = time.process_time()
    for _ in range(3):
        math_answer.read_answers(text, {"answer": "6"})
    assert time.process_time() - started < 0.7


@pytest.mark.parametrize("gold", ["5", "0", r"\sqrt{2}", "x", "y = 2x"])
@pytest.mark.parametrize(
    "answer",
    [
        r"\pi^{600}\cdot\pi^{600}",
        r"e^{700}e^{700}",
        r"\pi^{600}/\pi^{-600}",
        r"\lfloor\pi^{600}\cdot\pi^{600}\cdot\pi\rfloor",
        r"y = \pi^{600}\cdot\pi^{600}x",
        r"\\,",  # a list without items
        r"\\\approx \ldots%",
    ],
)
def test_value_beyond_double_precision_or_no_value_equals_nothing(answer: str, gold: str) -> None:
    boxed = rf"\boxed{{{answer}}}"
    assert not math_answer.compare_plain(*math_answer.read_answers(boxed, {"answer": gold}))


def test_end_of_a_long_response_decides() -> None:
    assert reward(r"\boxed{41}" + "so " * 100_000 + r"\boxed{42}", "42") == 1.0
