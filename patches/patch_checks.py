"""Checks whether a patch fits the installed version; called before it replaces a name."""

from __future__ import annotations

import importlib
import types
from typing import Any


class DriftError(RuntimeError):
    """The installed package no longer has the code that a patch replaces."""


def core_module(name: str) -> types.ModuleType:
    """Imports megatron.core.NAME; raises DriftError where there is no such module."""
    try:
        return importlib.import_module(f"megatron.core.{name}")
    except ModuleNotFoundError as e:
        raise DriftError(f"megatron.core.{name} is gone") from e


def require(owner: Any, *names: str) -> None:
    """Raises DriftError unless the module or class has all these attributes."""
    for name in names:
        if not hasattr(owner, name):
            raise DriftError(f"{owner.__name__}.{name} is gone")
