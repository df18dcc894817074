"""Finds the Python environment that has SGLang."""

from __future__ import annotations

import os
from pathlib import Path

ENGINE_VARIABLE = "MEGATRON_ASYNC_RL_ENGINE_PYTHON"


def engine_python() -> Path | None:
    """The Python that has SGLang: what the environment variable names, else the newest complete environment."""
    named = os.environ.get(ENGINE_VARIABLE)
    if named:
        return Path(named).expanduser()
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = Path(
        os.environ.get("MEGATRON_ASYNC_RL_CACHE") or f"{cache_home}/megatron_async_rl"
    ).expanduser()
    complete = [
        mark
        for mark in cache.glob("engine-*/.complete")
        if (mark.parent / "bin" / "python").exists()
    ]
    return (
        max(complete, key=lambda mark: mark.stat().st_mtime).parent / "bin" / "python"
        if complete
        else None
    )
