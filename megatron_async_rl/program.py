"""Texts of messages for the user who typed a command: the command again, and its folder."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path


def program() -> str:
    """Returns the words that a user types before a command; the launcher script sets a variable."""
    if name := os.environ.get("MEGATRON_ASYNC_RL_PROGRAM"):
        return name
    if Path(sys.argv[0]).name == "__main__.py":
        return "python -m megatron_async_rl"
    return "megatron-async-rl"


def command(*words: str | os.PathLike[str]) -> str:
    """Returns a command line that can be copied into a shell."""
    return " ".join([program(), *(shlex.quote(os.fspath(word)) for word in words)])


def looked_up_in(path: Path) -> str:
    """Returns the end of a message that a file is missing: the folder of a relative path."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"
