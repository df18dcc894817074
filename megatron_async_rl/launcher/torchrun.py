"""Builds the torchrun command of the launcher, trainer nodes, `replay` and `selftest`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def command(ranks: int, rendezvous: Sequence[str], module: str, *arguments: str) -> list[str]:
    """Returns torchrun's command line: `ranks` processes on this host that run `module`."""
    return [
        *(sys.executable, "-m", "megatron_async_rl.trainer.torchrun"),
        *(*rendezvous, f"--nproc-per-node={ranks}", "--no-python"),
        *(sys.executable, "-m", module, *arguments),
    ]


def file_rendezvous(folder: Path) -> list[str]:
    """Returns the options for one host: ranks meet through files, nothing listens."""
    return ["--nnodes=1", "--rdzv-backend=file", f"--rdzv-endpoint={folder}"]
