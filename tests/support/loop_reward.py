"""A reward function for whole runs; their configuration names it `loop_reward:even_digits`."""

from typing import Any


def even_digits(prompt: str, response: str, row: dict[str, Any]) -> float:
    """Returns the fraction of even digits in the response, which differs within a group."""
    digits = [int(character) for character in response if character.isdigit()]
    return sum(digit % 2 == 0 for digit in digits) / len(digits) if digits else 0.0


def broken(prompt: str, response: str, row: dict[str, Any]) -> float:
    raise ValueError("no answer in the row")


def constant(prompt: str, response: str, row: dict[str, Any]) -> float:
    return 1.0
