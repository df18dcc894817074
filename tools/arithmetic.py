r"""Writes a dataset of three-digit additions, on which the tiny model is trained and evaluated.

    python tools/arithmetic.py train.jsonl --count 4000 --seed 0 --split train

Each line holds one problem: {"id": "347+285", "prompt": "347+285=", "answer": "632"}. A hash of the
two numbers, in either order, assigns a problem to `train` or `eval`; no seed or count mixes them.

A solution adds column by column from the right with written carries, and ends in a box:

    347+285=12;12+1=13;5+1=6;\boxed{632}

`write_solution` imitates careless authors, as in pre-training data (see tools/make_tiny_model.py):
some solutions show no working, and carries are forgotten. Needs no torch.
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
        """By the unordered pair, because a+b in one split and b+a in the other would be a leak."""
        key = f"{min(self.a, self.b)}+{max(self.a, self.b)}".encode()
        return "eval" if hashlib.sha256(key).digest()[0] % EVAL_SHARE == 0 else "train"


@dataclass(frozen=True, slots=True)
class Habits:
    """Habits of the authors of the pre-training text; each field is a probability."""

    shows_working: float = 0.55  # otherwise the solution is only a box with a guess
    carries: float = 0.35  # of each carry, in a solution with working
    slips: float = 0.7  # without working: one digit of the guess is random


def draw_problems(split: Split, seed: int) -> Iterator[Problem]:
    """Yields uniform draws from one split without end; the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        problem = Problem(rng.randint(LOW, HIGH), rng.randint(LOW, HIGH))
        if problem.split == split:
            yield problem


def distinct_problems(split: Split, count: int, seed: int) -> list[Problem]:
    # half of the smaller split: drawing stays quick
    most = (HIGH - LOW + 1) ** 2 // (2 * EVAL_SHARE)
    if count > most:
        raise ValueError(
            f"--count={count}: at most {most} distinct problems can be drawn; lower --count"
        )
    found: dict[Problem, None] = {}  # a dict keeps the order drawn
    for problem in draw_problems(split, seed):
        found[problem] = None
        if len(found) == count:
            break
    return list(found)


def write_solution(problem: Problem, habits: Habits, rng: random.Random) -> str:
    """Returns one solution; with working it is right if no carry is forgotten."""
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
    """Returns the digits in the last box, or None; training uses math-verify instead."""
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
