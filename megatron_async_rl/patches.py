"""Where our patches of third-party packages lie, and how the trainer's processes apply theirs.

They are applied at start by a call, never by importing a package; a patch that no longer fits stops the process.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def patches_dir() -> Path:
    """The folder `patches/` next to the package in a checkout, or its copy inside an installed package."""
    package = Path(__file__).resolve().parent
    for candidate in (package.parent / "patches", package / "_patches"):
        if (candidate / "megatron_cpu").is_dir():
            return candidate
    raise FileNotFoundError(
        f"no patches folder next to {package} and no _patches in it; install the package with pip, or run it from a checkout"
    )


def prepare_megatron() -> None:
    """Makes megatron.core importable and usable on this machine; call it before the first import of megatron.core."""
    folder = str(patches_dir())
    if folder not in sys.path:
        sys.path.append(folder)  # last: no name in it may shadow an installed package
    importlib.import_module("megatron_cpu").install()
