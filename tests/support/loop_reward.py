"""A reward of the tests' own, named in the configuration as `loop_reward:even_digits`."""

from typing import Any


def even_digits(prompt: str, response: str, row: dict[str, Any]) -> float:
    """The share of even digits in the response, to have rewards that differ within a group."""
    digits = [int(character) for character in response if character.isdigit()]
    return sum(digit % 2 == 0 for digit in digits) / len(digits) if digits else 0.0
