"""The reward function of smollm2.yaml. `math` would accept the problem itself as an answer."""

import re
from typing import Any

_NUMBER = re.compile(r"-?\d+")


def reward(prompt: str, response: str, row: dict[str, Any]) -> float:
    """Returns 1 if the answer is the first number after the last equals sign, else 0.

    Without an equals sign the last number counts.
    """
    _, sign, result = response.rpartition("=")
    numbers = _NUMBER.findall(result) if sign else _NUMBER.findall(response)[-1:]
    return float(bool(numbers) and numbers[0] == row["answer"])
