"""Finds the Python environment of the engine (SGLang)."""

from __future__ import annotations

import os
from pathlib import Path

ENGINE_VARIABLE = "MEGATRON_ASYNC_RL_ENGINE_PYTHON"


def engine_python() -> Path | None:
    """Returns the Python of the environment variable, else of the newest complete environment."""
    if chosen := os.environ.get(ENGINE_VARIABLE):
        return Path(chosen).expanduser()
    marks = sorted(cache_dir().glob("engine-*/.complete"), key=lambda mark: mark.stat().st_mtime)
    pythons = [mark.parent / "bin" / "python" for mark in marks]
    return next((python for python in reversed(pythons) if python.exists()), None)


def cache_dir() -> Path:
    """Returns the folder of the environments that tools/setup_env.sh makes."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = os.environ.get("MEGATRON_ASYNC_RL_CACHE") or f"{cache_home}/megatron_async_rl"
    return Path(cache).expanduser()
