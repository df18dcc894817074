"""Checks of `rollout.workflow_options`, for the constructors of the workflows that ship."""

from __future__ import annotations

from typing import Any

from megatron_async_rl.errors import ConfigError


def integer(name: str, value: Any, lowest: int) -> int:
    """Returns the value. Raises ConfigError unless it is a whole number of at least `lowest`."""
    if type(value) is not int or value < lowest:
        raise _wrong(name, value, f"a whole number of at least {lowest}")
    return value


def number(name: str, value: Any, lowest: float, highest: float) -> float:
    """Returns the value. Raises ConfigError unless it is a number from `lowest` to `highest`."""
    if type(value) not in (int, float) or not lowest <= value <= highest:
        raise _wrong(name, value, f"a number from {lowest:g} to {highest:g}")
    return float(value)


def text(name: str, value: Any) -> str:
    """Returns the value. Raises ConfigError unless it is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise _wrong(name, value, "a text that is not empty")
    return value


def _wrong(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"rollout.workflow_options.{name} = {value!r}: expected {expected}",
        "docs/workflows.md has the options of each workflow",
    )
