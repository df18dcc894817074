r"""Three-digit additions with worked solutions: the problems the tiny model is trained and tested on.

    python tools/arithmetic.py train.jsonl --count 4000 --seed 0 --split train

writes one problem a line, {"id": "347+285", "prompt": "347+285=", "answer": "632"}. A problem belongs to
`train` or `eval` by a hash of its two numbers in either order, so no seed or count can mix the two.

A solution adds column by column from the right and carries on paper. It ends in a box, for math-verify:

    347+285=12;12+1=13;5+1=6;\boxed{632}

`write_solution` writes as a careless crowd does, which is what pre-training data is like (see
tools/make_tiny_model.py): some answers come without working, and carries get lost. Needs no torch.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "eval"]

LOW, HIGH = 100, 999  # three digits each, so every prompt has the same length
EVAL_SHARE = 10  # one problem in ten is held out


@dataclass(frozen=True, slots=True)
class Problem:
    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b)

    @property
    def split(self) -> Split:
        """By the unordered pair: a+b in one split and b+a in the other would be a leak."""
        key = f"{min(self.a, self.b)}+{max(self.a, self.b)}".encode()
        return "eval" if hashlib.sha256(key).digest()[0] % EVAL_SHARE == 0 else "train"


@dataclass(frozen=True, slots=True)
class Habits:
    """How the crowd that wrote the pre-training text works; each field is a probability."""

    shows_working: float = 0.55  # else the box comes straight away, from adding columns in the head
    carries: float = 0.35  # each carry that is due, when working on paper
    slips: float = 0.7  # without working: one digit of the guess is any digit at all


def draw_problems(split: Split, seed: int) -> Iterator[Problem]:
    """An endless stream of uniform draws from one split; the same for the same seed."""
    rng = random.Random(seed)
    while True:
        problem = Problem(rng.randint(LOW, HIGH), rng.randint(LOW, HIGH))
        if problem.split == split:
            yield problem


def distinct_problems(split: Split, count: int, seed: int) -> list[Problem]:
    most = (HIGH - LOW + 1) ** 2 // (
        2 * EVAL_SHARE
    )  # half of the smaller split: drawing stays quick
    if count > most:
        raise ValueError(
            f"--count={count}: at most {most} distinct problems are drawn; lower --count"
        )
    found: dict[Problem, None] = {}  # a dict keeps the order drawn
    for problem in draw_problems(split, seed):
        found[problem] = None
        if len(found) == count:
            break
    return list(found)


def write_solution(problem: Problem, habits: Habits, rng: random.Random) -> str:
    """One solution by one member of the crowd: right if no carry that was due got lost."""
    columns = list(
        zip(map(int, reversed(str(problem.a))), map(int, reversed(str(problem.b))), strict=True)
    )
    if rng.random() >= habits.shows_working:
        return _guess([x + y for x, y in columns], habits, rng)
    steps, digits, carry = [], "", 0
    for place, (x, y) in enumerate(columns):
        total = x + y
        steps.append(f"{total}+1={total + 1};" if carry else f"{total};")
        total += carry
        last = place == len(columns) - 1
        digits = (str(total) if last else str(total % 10)) + digits
        carry = int(total >= 10 and rng.random() < habits.carries)
    return "".join(steps) + f"\\boxed{{{digits}}}"


def _guess(sums: list[int], habits: Habits, rng: random.Random) -> str:
    digits = [str(total % 10) for total in sums[:-1]] + [str(sums[-1])]
    if rng.random() < habits.slips:
        digits[rng.randrange(len(digits) - 1)] = str(rng.randrange(10))
    return f"\\boxed{{{''.join(reversed(digits))}}}"


def final_answer(text: str) -> str | None:
    """The digits in the last box, or None. Enough to measure with here; training uses math-verify."""
    boxes = re.findall(r"\\boxed\{(\d+)\}", text)
    return boxes[-1] if boxes else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=["train", "eval"], required=True)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as lines:
        for problem in distinct_problems(args.split, args.count, args.seed):
            row = {
                "id": f"{problem.a}+{problem.b}",
                "prompt": problem.prompt,
                "answer": problem.answer,
            }
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
