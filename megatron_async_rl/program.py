"""The name under which the command line was started, for messages that name a command."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def program() -> str:
    """Returns the words that a user types before a command; the launcher script sets a variable."""
    if name := os.environ.get("MEGATRON_ASYNC_RL_PROGRAM"):
        return name
    if Path(sys.argv[0]).name == "__main__.py":
        return "python -m megatron_async_rl"
    return "megatron-async-rl"
