# ruff: noqa: RUF001 - answers with unicode characters
r"""The built-in `math` reward on the forms in which answers are written.

Units, mixed numbers, bases, choices, intervals, unicode, statements without a box, and thinking.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time

import pytest

from megatron_async_rl.reward import math_answer
from megatron_async_rl.reward.math import evaluation, formula

RIGHT = [
    (r"<think>so \boxed{42}</think> The answer is 41.", "41"),
    (r"\boxed{2 1/2}", "5/2"),
    (r"\boxed{5/2}", "2 1/2"),
    (r"\boxed{25 cm^2}", "25"),
    (r"\boxed{25 m/s}", "25"),
    (r"\boxed{90°}", "90"),
    (r"\boxed{€18}", "18"),
    (r"\boxed{12,345 dollars}", "12345"),
    (r"\boxed{C) 12}", "C"),
    (r"\boxed{\textbf{(C)}\ 12}", "C"),
    (r"The answer is $2\sqrt{3}$.", r"2\sqrt{3}"),
    ("The area is 25 cm^2.", "25"),
    (r"\boxed{x<3}", r"(-\infty,3)"),
    (r"\boxed{1.5e3}", "1500"),
    (r"\boxed{12.5\%}", "12.5"),
    (r"\boxed{√2}", r"\sqrt{2}"),
    (r"\boxed{½}", "1/2"),
    (r"\boxed{[1, ∞)}", r"[1,\infty)"),
    (r"\fbox{x+1}", "x+1"),
    (r"\boxed{42} as asked, within \boxed{}.", "42"),
    (r"\boxed{**42**}", "42"),
    ("The sum is 2 1/2.", "2.5"),
    (r"\boxed{100 m^3}", "100"),
    (r"\boxed{USD 18}", "18"),
    (r"\boxed{D: 14}", "D"),
    (r"\boxed{Choice D}", "D"),
    ("The answer is no.", "no"),
    (r"\boxed{x\ge 5}", r"[5,\infty)"),
    (r"\boxed{5e-1}", "0.5"),
    (r"\boxed{12.5}", r"12.5\%"),
    ("\\boxed{17\u200b}", "17"),
    (r"\boxed 17 apples in 3 boxes", "17"),
    (r"\boxed{3\tfrac{1}{2}}", "3.5"),
    (r"\boxed{-2½}", "-5/2"),
    (r"\boxed{7 3/4}", r"\frac{31}{4}"),
    (r"\boxed{45^{\circ}}", "45"),
    (r"\boxed{45 degrees}", r"45^\circ"),
    (r"\boxed{45}", r"45^\circ"),
    (r"\boxed{US$ 20}", "20"),
    (r"\boxed{20 USD}", "20"),
    (r"\boxed{\$20.00}", "20"),
    (r"\boxed{20 euros}", "20"),
    (r"\boxed{£20}", r"\$20"),
    (r"\boxed{¥1,200}", "1200"),
    (r"\boxed{Rs. 500}", "500"),
    (r"\boxed{50 cents}", "50"),
    (r"\boxed{5 million}", "5000000"),
    (r"\boxed{2 dozen}", "24"),
    (r"\boxed{3.2\times10^{-4}}", "0.00032"),
    (r"\boxed{3.2 × 10⁻⁴}", "0.00032"),
    (r"\boxed{3.2E-4}", "0.00032"),
    (r"\boxed{2*10^3}", "2000"),
    (r"\boxed{10**3}", "1000"),
    (r"\boxed{x ∈ [1, 3)}", "[1,3)"),
    (r"\boxed{1 ≤ x < 3}", "[1,3)"),
    (r"\boxed{[1,3)}", r"1\le x<3"),
    (r"\boxed{x>2 \text{ or } x<-2}", r"(-\infty,-2)\cup(2,\infty)"),
    (r"\boxed{x \ne 3}", r"(-\infty,3)\cup(3,\infty)"),
    (r"\boxed{(-\infty,3)\cup(3,\infty)}", r"x\ne 3"),
    (r"\boxed{3 > x}", r"(-\infty,3)"),
    (r"\boxed{-2<x\leq 5}", "(-2,5]"),
    (r"\boxed{all real numbers}", r"(-\infty,\infty)"),
    (r"\boxed{\mathbb{R}}", r"(-\infty,\infty)"),
    (r"\boxed{x\geq0}", r"[0,\infty)"),
    (r"\boxed{y \in (2,\infty)}", r"(2,\infty)"),
    (r"\boxed{1101_{2}}", "1101_2"),
    (r"\boxed{(1101)_{2}}", "1101_{2}"),
    (r"\boxed{2B_{16}}", "2B_{16}"),
    (r"\boxed{1101_{\text{two}}}", "1101_2"),
    (r"\boxed{1101 base 2}", "1101_2"),
    (r"\boxed{1101 (base 2)}", "1101_2"),
    (r"\boxed{13_{10}}", "13"),
    (r"\boxed{9:15 am}", r"9:15\text{ a.m.}"),
    (r"\boxed{(B)}", "B"),
    (r"\boxed{B.}", "B"),
    (r"\boxed{B) 17}", "B"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{Answer: B}", "B"),
    (r"\boxed{Option (B)}", "B"),
    (r"\boxed{\mathrm{(B)}}", "(B)"),
    (r"\boxed{b}", "B"),
    (r"\boxed{\emptyset}", r"\varnothing"),
    (r"\framebox{17}", "17"),
    (r"\fbox{$17$}", "17"),
    (r"\boxed{17}\boxed{ }", "17"),
    (r"**\boxed{17}**", "17"),
    (r"\boxed{`17`}", "17"),
    (r"\boxed{*17*}", "17"),
    (r"\boxed{__17__}", "17"),
    (r"\boxed{\mathbf{17}}", "17"),
    (r"\boxed{\boldsymbol{x+1}}", "x+1"),
    (r"\boxed{\displaystyle \frac12}", "1/2"),
    (r"\boxed17", "17"),
    (r"\boxed\frac12", "1/2"),
    (r"\boxed{\text{The answer is } 17}", "17"),
    (r"\boxed{\text{Answer: } 17}", "17"),
    ("The answer is $x^2+1$.", "x^2+1"),
    (r"So the perimeter is $4\sqrt{5}$ cm.", r"4\sqrt{5}"),
    ("We get 12 apples in total.", "12"),
    ("There are 7 days, so 7 * 6 = 42 dollars.", "42"),
    ("The answer is: 42", "42"),
    ("The answer is **42**.", "42"),
    ("Answer: (2, 3)", "(2,3)"),
    (r"The final answer is $\frac{3}{4}$. I hope it is correct.", "3/4"),
    ("The answer is 2^10.", "1024"),
    ("Thus x = 5.", "5"),
    ("Therefore, the answer is blue.", "blue"),
    ("The answer is Tuesday", "Tuesday"),
    ("So the answer is 10 cm^3.", "10"),
    ("The area is 12π.", r"12\pi"),
    ("The area is 12 pi.", r"12\pi"),
    ("She pays $18.50.", "18.5"),
    ("The total is $1,234.", "1234"),
    ("She makes 9 * 2 = $18 every day.", "18"),
    ("<thinking>6</thinking> 7", "7"),
    (r"</think> \boxed{7}", "7"),
    ("<think>x</think>\n\n**Final Answer**\n\\[ \\boxed{7} \\]", "7"),
    ("**Final Answer**\n\n$7$", "7"),
    ("**Final Answer:** 7", "7"),
    ("### Final Answer\n7", "7"),
    (r"Answer: $2\sqrt{113}$", r"2\sqrt{113}"),
    (r"The answer is \(\frac{1}{2}\), i.e. 0.5", "1/2"),
    ("Final answer: x = 3, y = 4", "(3,4)"),
    ("The solutions are $x = 2$ and $x = 3$.", "2,3"),
    ("The solutions are $2$ and $3$.", "2, 3"),
    (r"Hence $m+n = 30+7 = \mathbf{37}$.", "37"),
    (r"So $a+b+c=\boxed{14}$", "14"),
    ("the probability is 3/8.", "3/8"),
    (r"So, the probability is \frac{3}{8}", "3/8"),
    ("so 2/3 of them, that is 12.", "12"),
    (r"\boxed{\text{25 students}}", "25"),
    (r"\boxed{25\,\text{km}}", "25"),
    (r"\boxed{25\ \mathrm{km/h}}", "25"),
    (r"\boxed{25\text{ square units}}", "25"),
    (r"\boxed{25cm}", "25"),
    (r"\boxed{25 \text{cm}^{2}}", "25"),
    (r"\boxed{25\,\frac{\text{m}}{\text{s}}}", "25"),
    (r"\boxed{25 m s^{-1}}", "25"),
    (r"\boxed{25 kg·m/s}", "25"),
    (r"\boxed{25 miles per hour}", r"25 \text{ mph}"),
    (r"\boxed{25%}", "0.25"),
    (r"\boxed{25 percent}", "25"),
    (r"\boxed{\frac{1}{4}}", r"25\%"),
    (r"\boxed{2, 3}", "3,2"),
    (r"\boxed{2 and 3}", "2,3"),
    (r"\boxed{\{2,3\}}", "2,3"),
    (r"\boxed{{2,3}}", r"\{2,3\}"),
    (r"\boxed{x=2 or x=3}", "2,3"),
    (r"\boxed{x = 2, 3}", "2,3"),
    (r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\boxed{y=2x+3}", "2x+3"),
    (r"\boxed{2x+3}", "y=2x+3"),
    (r"\boxed{2x-y+3=0}", "y=2x+3"),
    (r"\boxed{f(x)=x^2}", "x^2"),
    (r"\boxed{3:2}", "3:2"),
    (r"\boxed{\sqrt{3}/2}", r"\frac{\sqrt{3}}{2}"),
    (r"\boxed{\frac{1}{\sqrt2}}", r"\frac{\sqrt2}{2}"),
    (r"\boxed{\frac{\sqrt{3}}{3}}", r"\frac{1}{\sqrt{3}}"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{1024}", "2^{10}"),
    (r"\boxed{5!}", "120"),
    (r"\boxed{\binom{6}{3}}", "20"),
    (r"\boxed{\ln 4}", r"2\ln 2"),
    (r"\boxed{0.33333333}", r"\frac13"),
    (r"\boxed{3.14159265}", r"\pi"),
    (r"\boxed{0.\overline{3}}", "1/3"),
    (r"\boxed{no solution}", r"\text{No solution}"),
    (r"\boxed{None}", "none"),
    (r"\boxed{True}", r"\text{true}"),
    (r"\boxed{(x+2)(x-3)}", "(x-3)(x+2)"),
    (r"\boxed{x^2-x-6}", "(x-3)(x+2)"),
    (r"\boxed{-3+4i}", "4i-3"),
    (r"\boxed{(3, 5, 7)}", "(3,5,7)"),
    (r"\boxed{3,5,7}", "(3,5,7)"),
    (r"\boxed{1 000 000}", "1000000"),
    (r"\boxed{1.000}", "1"),
    (r"\boxed{1_000}", "1000"),
    (r"\boxed{+5}", "5"),
    (r"\boxed{5.}", "5"),
    (r"\boxed{.5}", "0.5"),
    (r"\boxed{10:30\,\mathrm{p.m.}}", "10:30 pm"),
    (r"\boxed{3}, \boxed{4}", "3,4"),
]
WRONG = [
    (r"<think>so \boxed{42}</think> The answer is 41.", "42"),
    (r"\boxed{0.0000001}", "0.0000002"),
    (r"\boxed{\frac{1}{2^{98}}}", r"\frac{1}{2^{99}}"),
    (r"\boxed{CB}", "BC"),
    (r"The answer is $2\sqrt{3}$.", "3"),
    ("The area is 25 cm^2.", "2"),
    (r"\boxed{10:30\text{ a.m.}}", r"10:30\text{ p.m.}"),
    (r"<think>it may be \boxed{6} but let me see whether", "6"),
    (r"\boxed{\frac{1}{3^{50}}}", r"\frac{1}{3^{60}}"),
    (r"\boxed{0.00000004}", "0.00000009"),
    ("Hence $n = 7^3$.", "3"),
    (r"\boxed{46°}", r"45^\circ"),
    (r"\boxed{5 million}", "5"),
    (r"\boxed{3.2e-5}", "0.00032"),
    (r"\boxed{1 ≤ x ≤ 3}", "[1,3)"),
    (r"\boxed{x\geq0}", r"(0,\infty)"),
    (r"\boxed{1101_3}", "1101_2"),
    (r"\boxed{2C_{16}}", "2B_{16}"),
    (r"\boxed{9:15 PM}", "9:15 a.m."),
    (r"\boxed{9\text{ p.m.}}", r"9\text{ a.m.}"),
    (r"\boxed{9 am}", "9 pm"),
    (r"\boxed{(A) or (B)}", "B"),
    (r"\boxed{A, B}", "B"),
    (r"\boxed{D}", "B"),
    (r"\boxed{0.00000012}", "0.00000013"),
    (r"\boxed{10^{-20}}", "10^{-21}"),
    (r"\boxed{0}", "10^{-20}"),
    (r"\boxed{1/1000000}", "0"),
    (r"\boxed{0.0000001}", "0"),
    (r"\boxed{e^{-30}}", "0"),
    ("The answer is $x^2+1$.", "1"),
    (r"So the perimeter is $4\sqrt{5}$ cm.", "5"),
    ("the answer is 3/4", "4"),
    ("The answer is 2^10.", "10"),
    ("I think that it is 5 or 6.", "6"),
    ("The answer is 5, or 6", "5"),
    ("The area is 12π.", "12"),
    ("She pays $18 for 3 shirts.", "18"),
    (r"<think>a</think><think>\boxed{7}", "7"),
    (r"<think>\boxed{7}</think>", "7"),
    ("The solutions are $x = 2$ and $x = 3$.", "3"),
    (r"\boxed{25m}", "25"),
    (r"\boxed{26%}", "25"),
    (r"\boxed{25 x}", "25"),
    (r"\boxed{25n}", "25"),
    (r"\boxed{2}", "2,3"),
    (r"\boxed{\begin{pmatrix}1&2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\boxed{y=2x-3}", "y=2x+3"),
    (r"\boxed{2:3}", "3:2"),
    (r"\boxed{0.333}", "1/3"),
    (r"\boxed{3.14}", r"\pi"),
    (r"\boxed{yes}", "no"),
    (r"\boxed{(5,3,7)}", "(3,5,7)"),
    (r"The answer is $\boxed{3}$ or $\boxed{4}$.", "4"),
    (r"\boxed{3} and \boxed{4}", "4"),
    (r"\boxed{3}. Alternatively, \boxed{4}", "4"),
]


def is_right(response: str, gold: str, tags: tuple[str, ...] = math_answer.THINKING_TAGS) -> bool:
    answers = math_answer.read_answers(response, {"id": "1", "answer": gold}, tags)
    decided = math_answer.compare_plain(*answers)
    return math_answer.compare_latex(*answers) if decided is None else decided


@pytest.mark.parametrize(("response", "gold"), RIGHT)
def test_equal_answer_in_another_form_is_right(response: str, gold: str) -> None:
    assert is_right(response, gold)


@pytest.mark.parametrize(("response", "gold"), WRONG)
def test_different_answer_is_wrong_in_every_form(response: str, gold: str) -> None:
    assert not is_right(response, gold)


@pytest.mark.parametrize("gold", dict.fromkeys(gold for _, gold in RIGHT))
def test_gold_equals_itself(gold: str) -> None:
    assert is_right(f"\\boxed{{{gold}}}", gold)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("[T]\\boxed{5}[/T] It is 6.", False),
        ("[T]\\boxed{6}[/T] It is 5.", True),
        ("[T]It is \\boxed{5}", False),
        ("<think>\\boxed{5}", True),
    ],
)
def test_thinking_tags_are_a_setting(response: str, right: bool) -> None:
    assert is_right(response, "5", ("[T]", "[/T]")) is right


def test_thinking_longer_than_the_searched_text_is_thinking() -> None:
    assert not is_right("<think>" + "so " * 50_000 + r"\boxed{5}", "5")
    assert is_right("<think>" + "so " * 50_000 + r"\boxed{4}</think> \boxed{5}", "5")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"2\frac{1}{2}", 2.5),
        (r"-2\frac12", -2.5),
        (r"\frac{1}{2}\cdot 3", 1.5),
        (r"2(3+4)", 14),
        (r"-3^2", -9),
        (r"2^{-1}", 0.5),
        (r"\sqrt[3]{-8}", -2),
        (r"\sin 30^\circ", 0.5),
        (r"\log_2 8", 3),
        (r"|3-5|", 2),
        (r"\lfloor 2.7\rfloor", 2),
        (r"\binom{5}{2}", 10),
        (r"4!/2", 12),
        (r"1.5e3", 1500),
        (r"\sqrt2\sqrt2-2", 0),
    ],
)
def test_formula_has_its_value(text: str, value: float) -> None:
    assert complex(evaluation.value(formula.parse(text), {})) == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["9^{9^{9}}", "10^{10^{10}}", "5000!", r"\binom{9999}{5000}", "1e999999", "2^{30000}"]
)
def test_huge_number_is_not_computed(text: str) -> None:
    started = time.process_time()
    with pytest.raises(evaluation.TooLarge):
        evaluation.value(formula.parse(text), {})
    assert time.process_time() - started < 1.0


HOSTILE = [
    "(",
    "{",
    "\\frac",
    "\\sqrt{",
    "x^",
    "-",
    "|",
    "1,",
    "\\pm",
    "\\text{",
    "=",
    "<",
    "½",
    "a ",
]


@pytest.mark.parametrize("parts", [*itertools.combinations_with_replacement(HOSTILE, 2)], ids=str)
def test_repeated_parts_cost_bounded_time(parts: tuple[str, str]) -> None:
    started = time.process_time()
    for count in (60, 290, 20_000):
        text = "".join(parts) * count
        for response in (f"\\boxed{{{text}}}", f"The answer is {text}", f"${text}$ 1"):
            answers = math_answer.read_answers(response, {"answer": "(1, 2)"})
            math_answer.compare_plain(*answers)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize("term", ["\\Gamma({}.3i)", "\\arctan(1/{})", "\\sqrt{{{}}}"])
def test_many_functions_cost_bounded_time(term: str) -> None:
    started = time.process_time()
    text = "+".join(map(term.format, range(3, 40)))
    answers = math_answer.read_answers(f"\\boxed{{1+0({text})}}", {"answer": "1"})
    math_answer.compare_plain(*answers)
    assert time.process_time() - started < 2.0


TINY = r"10^{40}(\sqrt{10^{40}+1}-10^{20})"  # 5 10^19; 0 in double precision


@pytest.mark.parametrize("term", [rf"\sin(e^{{{TINY}}})", rf"\ln(1+ie^{{-{TINY}}})"])
def test_number_that_is_huge_only_with_many_digits_is_left_to_math_verify(term: str) -> None:
    """Its sine would take hours, the logarithm all memory."""
    answers = math_answer.read_answers(f"\\boxed{{1+0{term}}}", {"answer": "1"})
    assert math_answer.compare_plain(*answers) is None


def test_equation_without_a_value_is_no_error() -> None:
    answers = math_answer.read_answers(r"\boxed{y + 1/(x-x) = 3}", {"answer": "x = 4"})
    assert math_answer.compare_plain(*answers) is None


def test_plain_comparison_imports_no_sympy() -> None:
    """It runs in the reward worker, which stays small."""
    program = (
        "import sys; from megatron_async_rl.reward import math_answer as m; "
        "print(m.compare_plain(*m.read_answers('\\\\boxed{1/2}', {'answer': '0.5'})), "
        "'sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"]
